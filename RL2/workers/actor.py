"""The policy: its token loss, and the corrections around that."""

from dataclasses import replace

import torch
from torch import Tensor

from RL2.algorithms.corrections import Corrections, corrected, reweighted
from RL2.algorithms.reductions import weighted_sum
from RL2.algorithms.segments import add_up
from RL2.algorithms.token_loss import TokenLoss
from RL2.distributed import Traffic
from RL2.distributed.comm import Batch
from RL2.runtime.user_code import Unfit
from RL2.workers.learner import Learner
from RL2.workers.packs import Pack, scatter_whole

_PACK_FIELDS = {
    "states",
    "lengths",
    "start",
    "positions",
    "pack",
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
        """A loss that advantages multiply learns nothing if they are all 0."""
        return not self.loss.is_multiplied or bool(batch["advantages"].any())

    @property
    def segments(self) -> tuple[str, ...]:
        return self.loss.segments

    def scatter_update(self, batch: Batch | None, fields: tuple[str, ...]) -> list[Batch]:
        if not self.segments:
            return super().scatter_update(batch, fields)
        return scatter_whole(self, batch, fields, self.segments, self.loss.kind)

    def losses(self, micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = tuple(dict.fromkeys((*self.loss.statistics, "logps", "entropy", "max_logps")))
        fields = {name: micro_batch[name] for name in micro_batch.keys() - _PACK_FIELDS}
        if self.segments:
            stats = self.forward(micro_batch, wanted, self.loss.top_k)
            return self._loss_of_segments(fields | stats, micro_batch["pack"])

        def loss_fn(stats: Batch, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            own = {name: field[rows] for name, field in fields.items()}
            return self._loss_of_tokens(own | stats)

        result = self.forward(micro_batch, wanted, self.loss.top_k, loss_fn)
        return result.pop("loss"), result

    def _loss_of_tokens(self, tokens: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the losses of some tokens, from their statistics and fields `[N]`, and
        the sums of their metrics."""
        weights = tokens["loss_weights"]
        losses, extra = self._call_loss(_with_old(tokens), len(weights))
        bad = ~losses.detach().isfinite() & (weights != 0)
        if self._multiplies:
            losses = losses * tokens["advantages"]
        objective, metrics = self._corrected(losses, tokens, Corrections.of(self.config))
        metrics |= {f"{self.name}/{name}": values.sum() for name, values in extra.items()}
        metrics["bad_losses"] = bad.to(weights).sum()
        return weighted_sum(objective, weights), metrics

    def _loss_of_segments(self, own: Batch, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for a loss of sequences, groups or pairs, which is called with all action tokens
        of a pack; each of the ranks that share the pack counts its part of the result.

        Entropy bonus and KL penalty are those of this rank's `own` tokens.
        """
        kind, corrections = self.loss.kind, Corrections.of(self.config)
        needed = {"logps", *self.loss.statistics}
        stats = pack.whole({name: own[name] for name in sorted(needed)})
        tokens = _with_old(pack.fields | stats) | pack.segments
        weights = add_up(tokens["loss_weights"], kind, pack.segments)
        losses, extra = self._call_loss(tokens, len(weights))
        bad = ~losses.detach().isfinite() & (weights != 0)
        each = pack.segments["sequences"].mean if kind == "sequences" else lambda x: x
        if self._multiplies:
            losses = losses * each(tokens["advantages"])
        if kind in ("tokens", "sequences") and "llm_logps" in tokens:
            old, llm = each(tokens["old_logps"]), each(tokens["llm_logps"])
            losses, masked = reweighted(losses, old, llm, corrections)
            extra = extra if masked is None else extra | {"tis_masked": masked}
        loss = weighted_sum(losses, weights) / len(pack.sizes)

        objective, metrics = self._corrected(
            torch.zeros_like(own["logps"]), own, replace(corrections, tis_coef=0.0)
        )
        share = pack.scale / len(pack.sizes)
        metrics |= {f"{self.name}/{name}": values.sum() * share for name, values in extra.items()}
        metrics["bad_losses"] = bad.to(weights).sum() / len(pack.sizes)
        return loss + weighted_sum(objective, own["loss_weights"]), metrics

    @property
    def _multiplies(self) -> bool:
        return self.loss.is_multiplied and self.config.avg_level != "correct"

    def _corrected(
        self, losses: Tensor, tokens: Batch, corrections: Corrections
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`corrected`, with the sums of the metrics that any tokens have."""
        objective, metrics = corrected(losses, _with_old(tokens), corrections)
        if self.moved and "old_logps" not in tokens:  # it would measure our own update
            metrics.pop("rollout/llm_kl", None)
        metrics[f"{self.name}/p_max"] = tokens["max_logps"].detach().exp().sum()
        return objective, metrics

    def _call_loss(self, tokens: Batch, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The `n` losses of some tokens, and their metrics; without tokens the loss is not called.

        After a fault a rank goes on without the loss, so that the others, which wait for its
        gradients, learn of it.
        """
        losses, metrics = tokens["logps"].new_zeros(n), {}
        if n and self.fault is None:
            try:
                losses, metrics = self.loss(tokens)
            except Unfit as fault:
                self.fault = str(fault)
        if not losses.requires_grad:  # others wait for a backward
            everywhere = torch.ones_like(tokens["logps"], dtype=torch.bool)
            losses = losses + tokens["logps"].masked_fill(everywhere, 0.0).sum()
        return losses, metrics


def _with_old(tokens: Batch) -> Batch:
    """Tokens with `old_logps`; if nothing has computed them, those of the present policy."""
    return {"old_logps": tokens["logps"].detach()} | tokens
