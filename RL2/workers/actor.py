"""The policy: what stands around its loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from RL2.algorithms.corrections import Corrections, penalised, reweighted
from RL2.algorithms.importance import sequence_weights
from RL2.algorithms.token_loss import TokenLoss
from RL2.distributed import Traffic
from RL2.distributed.comm import Batch
from RL2.workers.learner import Learner


class Actor(Learner):
    """A policy: advantages and importance weights multiply its loss, entropy and KL are added.

    Args: see `Learner`.
    """

    statistics = ("logps", "entropy", "max_logps")

    def __init__(
        self,
        config,
        device: torch.device,
        loss: TokenLoss,
        max_bad_steps: int = 1,
        traffic: Traffic | None = None,
    ):
        super().__init__(config, device, "actor", loss, max_bad_steps, traffic)

    @property
    def fields(self) -> tuple[str, ...]:
        own = ("advantages", "old_logps", "ref_logps", "llm_logps", "tis_weights")
        return (*own, *self.loss.fields)

    def learns(self, batch: Batch) -> bool:
        """A loss that advantages multiply learns nothing if they are all 0."""
        return not self.loss.is_multiplied or bool(batch["advantages"].any())

    def whole_batch_fields(self, batch: Batch) -> Batch:
        """With the importance weights of whole sequences."""
        fields, corrections = super().whole_batch_fields(batch), Corrections.of(self.config)
        if corrections.of_sequences and "llm_logps" in batch:
            fields["tis_weights"] = sequence_weights(
                batch["old_logps"], batch["llm_logps"], batch["action_mask"], batch["sample_ids"],
                corrections.tis_coef, corrections.tis_type,
            )  # fmt: skip
        return fields

    def complete(self, tokens: Batch) -> Batch:
        """Tokens with `old_logps`; if nothing has computed them, those of the present policy."""
        return {"old_logps": tokens["logps"].detach()} | tokens

    def scaled(
        self, losses: Tensor, tokens: Batch, each: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Batch]:
        if self.loss.is_multiplied and self.config.avg_level != "correct":
            losses = losses * each(tokens["advantages"])
        if self.loss.kind not in ("tokens", "sequences") or "llm_logps" not in tokens:
            return losses, {}
        old, llm = each(tokens["old_logps"]), each(tokens["llm_logps"])
        weights = each(tokens["tis_weights"]) if "tis_weights" in tokens else None
        losses, masked = reweighted(losses, old, llm, Corrections.of(self.config), weights)
        return losses, {} if masked is None else {"tis_masked": masked}

    def penalised(self, losses: Tensor, tokens: Batch) -> tuple[Tensor, Batch]:
        losses, sums = penalised(losses, self.complete(tokens), Corrections.of(self.config))
        if self.moved and "old_logps" not in tokens:  # it would measure our own update
            sums.pop("rollout/llm_kl", None)
        sums[f"{self.name}/p_max"] = tokens["max_logps"].detach().exp().sum()
        return losses, sums
