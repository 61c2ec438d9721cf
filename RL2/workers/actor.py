"""The policy: the loss of its tokens, and what is put around it."""

import torch
from torch import Tensor

from RL2.algorithms.corrections import Corrections, corrected
from RL2.algorithms.reductions import weighted_sum
from RL2.algorithms.token_loss import TokenLoss
from RL2.distributed import Traffic
from RL2.distributed.comm import Batch
from RL2.ops.token_stats import TokenStats
from RL2.runtime.user_code import Unfit
from RL2.workers.learner import Learner

_OF_THE_PACK = {
    "states",
    "lengths",
    "start",
    "positions",
}  # the others are [N], one per action token


class Actor(Learner):
    """A policy that learns by a token loss.

    Args:
        config: the `actor` node.
        device: this rank's device.
        loss: what `update` minimises.
        max_bad_steps, traffic: see `Learner`.
    """

    def __init__(
        self,
        config,
        device: torch.device,
        loss: TokenLoss,
        max_bad_steps: int = 1,
        traffic: Traffic | None = None,
    ):
        super().__init__(config, device, "actor", max_bad_steps, traffic)
        self.loss = loss

    @property
    def origin(self) -> str:
        return self.loss.origin

    @property
    def fields(self) -> tuple[str, ...]:
        return ("advantages", "old_logps", "ref_logps", "llm_logps", *self.loss.fields)

    def learns(self, batch: Batch) -> bool:
        """A loss that does not read the advantages is multiplied by them."""
        return self.loss.uses_advantages or bool(batch["advantages"].any())

    def losses(self, micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = tuple(dict.fromkeys((*self.loss.statistics, "logps", "entropy", "max_logps")))

        def loss_fn(stats: TokenStats, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            return self._loss_of_tokens(
                {name: micro_batch[name][rows] for name in micro_batch.keys() - _OF_THE_PACK}
                | stats.as_dict()
            )

        result = self.forward(micro_batch, wanted, self.loss.top_k, loss_fn)
        return result.pop("loss"), result

    def _loss_of_tokens(self, tokens: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the losses of some tokens, from their statistics and fields `[N]`, and
        the sums of their metrics."""
        loss = self.loss
        # Where the weights have moved, those of now are not those that the batch met.
        known = "old_logps" in tokens or not self.moved
        tokens = {"old_logps": tokens["logps"].detach()} | tokens
        losses, extra = self._call_loss(tokens)
        bad = ~losses.detach().isfinite() & (tokens["loss_weights"] != 0)
        if not loss.uses_advantages and self.config.avg_level != "correct":
            losses = losses * tokens["advantages"]
        objective, metrics = corrected(losses, tokens, Corrections.of(self.config))
        if not known:  # it would be the distance to our own update
            metrics.pop("rollout/llm_kl", None)
        metrics |= {f"{self.name}/{name}": values.sum() for name, values in extra.items()}
        metrics["bad_losses"] = bad.to(tokens["logps"]).sum()
        metrics[f"{self.name}/p_max"] = tokens["max_logps"].detach().exp().sum()
        return weighted_sum(objective, tokens["loss_weights"]), metrics

    def _call_loss(self, tokens: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the loss says of some tokens; it is not asked about none.

        After a fault a rank goes on without it, so that the others, who wait for its gradients,
        come to hear of that.
        """
        losses, metrics = torch.zeros_like(tokens["logps"]), {}
        if len(losses) and self.fault is None:
            try:
                losses, metrics = self.loss(tokens)
            except Unfit as fault:
                self.fault = str(fault)
        if not losses.requires_grad:  # a backward there must be, as others wait for it
            everywhere = torch.ones_like(losses, dtype=torch.bool)
            losses = losses + tokens["logps"].masked_fill(everywhere, 0.0)
        return losses, metrics
