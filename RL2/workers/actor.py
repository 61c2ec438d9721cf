"""The policy: what stands around its loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from RL2.algorithms.corrections import Corrections, penalised, reweighted
from RL2.algorithms.importance import sequence_weights
from RL2.algorithms.reductions import token_weights
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
        seed: int = 0,
    ):
        super().__init__(config, device, "actor", loss, max_bad_steps, traffic, seed)

    @property
    def fields(self) -> tuple[str, ...]:
        own = ("advantages", "old_logps", "ref_logps", "llm_logps", "tis_weights")
        return (*own, *self.loss.fields)

    def learns(self, batch: Batch) -> bool:
        """A loss that advantages multiply learns nothing if they are all 0."""
        return not self.loss.is_multiplied or bool(batch["advantages"].any())

    def whole_batch_fields(self, batch: Batch) -> Batch:
        """With the importance weights of whole sequences, and weights of the KL's own."""
        fields, corrections = super().whole_batch_fields(batch), Corrections.of(self.config)
        if corrections.kl_avg_level is not None and "ref_logps" in batch:
            mask, correct, samples = (
                batch[name] for name in ("action_mask", "correct", "sample_ids")
            )
            level = corrections.kl_avg_level
            fields["kl_weights"] = token_weights(mask, correct, level, samples)
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

    def refuses(self, totals: dict[str, float], n_actions: int) -> str | None:
        """A policy that is too far from the one that the advantages are of."""
        bound = self.config.get("max_ratio")
        too_far = bound is not None and totals["actor/mean_ratio"] / n_actions > bound
        return "actor/ratio_skipped" if too_far else None

    def total(self, losses: Tensor, tokens: Batch) -> tuple[Tensor, Batch]:
        had_old, tokens = "old_logps" in tokens, self.complete(tokens)
        loss, sums = penalised(losses, tokens, Corrections.of(self.config))
        if self.moved and not had_old:  # it would measure our own update
            sums.pop("rollout/llm_kl", None)
        sums["actor/p_max"] = tokens["max_logps"].detach().exp().sum()
        if self.config.get("max_ratio") is not None:
            ratios = (tokens["logps"].detach() - tokens["old_logps"]).exp()
            sums |= {"actor/mean_ratio": ratios.sum(), "actor/ratio_skipped": ratios.new_zeros(())}
        return loss, sums
