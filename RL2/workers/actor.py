"""The policy: its log-probabilities and its update."""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from RL2.algorithms.contract import RESERVED
from RL2.algorithms.importance import importance_weights
from RL2.algorithms.kl import approx_kl
from RL2.algorithms.reductions import token_weights, weighted_sum
from RL2.algorithms.token_loss import TokenLoss
from RL2.distributed import Traffic, broadcast, gather, rank, scatter, sum_over_ranks, world_size
from RL2.distributed.agreement import all_names, first_reason
from RL2.distributed.comm import Batch
from RL2.models.causal_lm import start_updates
from RL2.ops.token_stats import TokenStats
from RL2.runtime.errors import TrainingError
from RL2.runtime.user_code import Unfit
from RL2.workers.base import Worker

logger = logging.getLogger(__name__)

_ALWAYS = ("states", "actions", "action_mask")
_OF_THE_PACK = {
    "states",
    "lengths",
    "start",
    "positions",
}  # the others are [N], one per action token


def split_batch(batch: Batch, n_parts: int) -> list[Batch]:
    """Cut a batch into `n_parts` optimizer batches, never through a multi-turn sample."""
    samples = batch["sample_ids"].unique_consecutive(return_counts=True)[1]
    rows_per_part = [int(counts.sum()) for counts in samples.tensor_split(n_parts)]
    split = {name: field.split(rows_per_part) for name, field in batch.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(n_parts)]


class Actor(Worker):
    """A policy, or with `train=False` a frozen reference.

    Args:
        config: the `actor` or `ref_actor` node.
        device: this rank's device.
        loss: what `update` minimises; None for a reference.
        max_bad_steps: non-finite updates in a row after which `update` raises.
        traffic: counts what crosses ranks.
    """

    def __init__(
        self,
        config,
        device: torch.device,
        loss: TokenLoss | None = None,
        max_bad_steps: int = 1,
        traffic: Traffic | None = None,
    ):
        super().__init__(config, device, train=loss is not None, traffic=traffic)
        self.loss = loss
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        self.fault: str | None = None  # what this rank's loss has done wrong
        self.warned: set[str] = set()  # metrics of the loss that were not finite once

    def compute_logps(self, batch: Batch | None, field: str) -> Batch | None:
        """Add this model's log-probabilities of the actions as `field [B, T]` (rank 0)."""
        length = self.config.max_inference_length_per_device
        micro_batches, plan = self._scatter(batch, _ALWAYS, length)
        logps = []
        with self.inference():
            for micro_batch in micro_batches:
                stats = self.forward(self.to_device(micro_batch), ("logps",))
                flat = torch.zeros(len(micro_batch["states"]))
                flat[micro_batch["action_mask"]] = stats["logps"].cpu()
                logps.append(flat)
        values = gather(logps, plan, self.traffic)
        if self.optimizer is None:  # a reference has nothing else to do in this step
            self.offload()
        return batch if values is None else batch | {field: values}

    def update(self, batch: Batch | None, step: int) -> dict[str, float]:
        """`update_per_rollout` optimizer steps on rank 0's batch; metrics on every rank.

        `batch` is None on the other ranks, and on rank 0 where a rollout left nothing to train
        on. What cannot change the weights (nothing sampled, no correct sequence with
        `avg_level=correct`, only zeros that a loss is multiplied by) is skipped whole and counted
        in `actor/skipped`; a loss or gradient that is not finite likewise in `actor/nonfinite`.

        Raises:
            TrainingError: `max_bad_steps` non-finite updates in a row, or a loss that breaks
                `RL2.algorithms.contract`; on every rank.
        """
        if step <= self.config.freeze_steps:
            return {}
        n_parts = self.config.update_per_rollout
        parts = [None] * n_parts if batch is None else split_batch(batch, n_parts)
        self.load(optimizer=True)
        start_updates(self.model, self.config.dropout)
        rate = self.scheduler.get_last_lr()[0]
        metrics: list[dict[str, float]] = []
        for part in parts:
            moved = any("actor/grad_norm" in one for one in metrics)
            metrics.append(self._optimizer_step(part, moved))
        return _merge(metrics) | {"actor/lr": rate}

    def _optimizer_step(self, batch: Batch | None, moved: bool) -> dict[str, float]:
        """moved: whether the weights are not those of the rollout any more."""
        order = None
        if rank() == 0:
            batch, order = self._count(batch)
        order = broadcast(order)
        if order is None:
            return {"actor/skipped": 1.0}
        n_actions, fields = order

        micro_batches, _ = self._scatter(batch, fields, self.config.max_length_per_device)
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches, start=1):
            # Over the replicas (HSDP) once an update; within one after every micro-batch, so that
            # no rank keeps whole gradients.
            self.model.set_requires_all_reduce(number == len(micro_batches))
            loss, metrics = self._losses(self.to_device(micro_batch))
            loss.backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        grad_norm = self.clip_gradients()
        # The norm does not see what one replica, or one tensor-parallel rank, has in parameters
        # that others hold as well: where it is not finite on one rank, all have to skip.
        sums["bad_ranks"] = (~grad_norm.isfinite()).to(grad_norm)
        sums["bad_calls"] = torch.full_like(grad_norm, self.fault is not None)
        # One wait for the device, however many metrics there are. A loss may have some on one rank
        # only: a token that has none counts as 0.
        names, zero = all_names(sums), torch.zeros_like(grad_norm)
        totals = sum_over_ranks(torch.stack([sums.get(name, zero).double() for name in names]))
        totals = totals / self.layout.tp_size  # whose ranks counted the same tokens
        totals, norm = dict(zip(names, totals.tolist(), strict=True)), grad_norm.item()
        if totals.pop("bad_calls"):
            self.optimizer.zero_grad()
            raise TrainingError(f"{self.loss.origin}: {first_reason(self.fault)}")
        n_bad, n_ranks = totals.pop("bad_ranks") * self.layout.tp_size, world_size()
        if n_bad == n_ranks and self._is_too_large_alone(totals["actor/loss"]):
            large = self.clip_large_gradients()
            n_bad, norm = sum_over_ranks((~large.isfinite()).to(large)).item(), large.item()
        if n_bad and math.isfinite(norm):
            norm = math.nan
        bad_losses = int(totals.pop("bad_losses"))
        metrics = {
            name: total if name == "actor/loss" else total / n_actions
            for name, total in totals.items()
        }
        if moved and "old_logps" not in fields:  # it would be the distance to our own update
            metrics.pop("rollout/llm_kl", None)
        metrics |= {"actor/grad_norm": norm, "actor/skipped": 0.0, "actor/nonfinite": 0.0}
        if not (math.isfinite(metrics["actor/loss"]) and math.isfinite(norm)):
            return self._reject(metrics, bad_losses)
        self.bad_steps = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return self._finite(metrics)

    def _is_too_large_alone(self, loss: float) -> bool:
        """Whether a norm that is not finite may be one whose squares float32 does not hold, and
        squares of the clipped gradients, which AdamW takes, are in its reach."""
        return math.isfinite(loss) and self.config.max_grad_norm**2 < torch.finfo(torch.float32).max

    def _scatter(self, batch: Batch | None, fields: tuple[str, ...], max_length: int):
        return scatter(batch, fields, max_length, self.layout, self.attention_cost, self.traffic)

    def _count(self, batch: Batch | None) -> tuple[Batch | None, tuple | None]:
        """Rank 0, before the first backward: what divides the loss, or None to skip."""
        level = self.config.avg_level
        if batch is None or not batch["action_mask"].any():
            return batch, None
        if level == "correct":
            learns = batch["correct"].any()
        else:  # a loss that does not read the advantages is multiplied by them
            learns = self.loss.uses_advantages or batch["advantages"].any()
        if not learns:
            return batch, None
        weights = token_weights(batch["action_mask"], batch["correct"], level, batch["sample_ids"])
        batch = batch | {"loss_weights": weights}
        wanted = {"advantages", "old_logps", "ref_logps", "llm_logps", *self.loss.fields}
        fields = (*_ALWAYS, "loss_weights", *sorted(wanted & batch.keys()))
        return batch, (int(batch["action_mask"].sum()), fields)

    def _losses(self, micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the batch loss, and of the sums behind the metrics."""
        wanted = tuple(dict.fromkeys((*self.loss.statistics, "logps", "entropy", "max_logps")))

        def loss_fn(stats: TokenStats, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            return self._loss_of_tokens(
                {name: micro_batch[name][rows] for name in micro_batch.keys() - _OF_THE_PACK}
                | stats.as_dict()
            )

        result = self.forward(micro_batch, wanted, self.loss.top_k, loss_fn)
        loss = result.pop("loss")
        return loss, result | {"actor/loss": loss}

    def _loss_of_tokens(self, tokens: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the losses of some tokens, from their statistics and fields `[N]`, and
        the sums of their metrics."""
        config, loss = self.config, self.loss
        logps, entropy = tokens["logps"], tokens["entropy"]
        old_logps = tokens.get("old_logps", logps.detach())
        losses, extra = self._call_loss(tokens | {"old_logps": old_logps})
        bad = ~losses.detach().isfinite() & (tokens["loss_weights"] != 0)
        if not loss.uses_advantages and config.avg_level != "correct":
            losses = losses * tokens["advantages"]
        llm_logps = tokens.get("llm_logps")
        weights = None
        if config.tis_coef > 0 and llm_logps is not None:
            weights = importance_weights(old_logps, llm_logps, config.tis_coef, config.tis_type)
            losses = losses.masked_fill(weights == 0, 0.0) * weights

        objective = losses
        if config.entropy.coef != 0:  # else entropy is a metric, and costs no gradient
            objective = objective - config.entropy.coef * entropy
        metrics = {f"actor/{name}": values.sum() for name, values in extra.items()}
        metrics["bad_losses"] = bad.to(logps).sum()
        metrics["actor/entropy"] = entropy.sum()
        metrics["actor/p_max"] = tokens["max_logps"].detach().exp().sum()
        if "ref_logps" in tokens:
            kl = approx_kl(logps, tokens["ref_logps"], config.kl.loss_estimator)
            metrics["actor/kl"] = kl.sum()
            if config.kl.type == "loss":
                objective = objective + config.kl.coef * kl
        if llm_logps is not None:
            # k3 on the engine's own samples: KL(engine || trainer), zero if both are one policy
            metrics["rollout/llm_kl"] = approx_kl(llm_logps, old_logps, "k3").sum()
        if weights is not None and config.tis_type == "mask":
            metrics["actor/tis_masked"] = (weights == 0).to(weights).sum()
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

    def _reject(self, metrics: dict[str, float], bad_losses: int) -> dict[str, float]:
        """bad_losses: how many of those that count were not finite as the loss returned them."""
        self.optimizer.zero_grad()
        self.bad_steps += 1
        what = _not_finite(metrics)
        if bad_losses:
            what += f"; {self.loss.origin} returned {bad_losses} losses that were not"
        if self.bad_steps == 1:
            logger.warning("actor: %s; this update was left out (actor/nonfinite)", what)
        if self.bad_steps >= self.max_bad_steps:
            raise TrainingError(
                f"actor: {what} in the last of {self.bad_steps} updates in a row "
                "(trainer.max_bad_steps) that had to be left out; lower actor.lr or look at the "
                "last rollouts"
            )
        return {"actor/nonfinite": 1.0, "actor/skipped": 0.0}

    def _finite(self, metrics: dict[str, float]) -> dict[str, float]:
        """Without the loss's own that are not finite, of each of which one line is said."""
        bad = {
            name: value
            for name, value in metrics.items()
            if not math.isfinite(value) and name.removeprefix("actor/") not in RESERVED
        }
        for name in bad.keys() - self.warned:
            logger.warning(
                "%s: the mean of its metric %s is %s, which is left out of the step's metrics",
                self.loss.origin, name.removeprefix("actor/"), bad[name],
            )  # fmt: skip
        self.warned |= bad.keys()
        return {name: value for name, value in metrics.items() if name not in bad}


def _not_finite(metrics: dict[str, float]) -> str:
    """Which of the two, of an update that is left out, was not finite."""
    values = {"loss": metrics["actor/loss"], "gradient norm": metrics["actor/grad_norm"]}
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    good = [f"{name} {value:.4g}" for name, value in values.items() if math.isfinite(value)]
    also = f" (the {good[0]} was)" if good else ""
    return f"the {' and the '.join(bad)} {'was' if good else 'were'} not finite{also}"


def _merge(metrics: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean over the optimizer steps that have the metric; counts are summed."""
    values: dict[str, list[float]] = {}
    for one in metrics:
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    counts = ("actor/skipped", "actor/nonfinite")
    return {
        name: sum(them) if name in counts else sum(them) / len(them)
        for name, them in values.items()
    }
