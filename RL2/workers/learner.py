"""What all learners share: the optimizer steps on a batch, and their metrics."""

import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from RL2.algorithms.contract import RESERVED
from RL2.algorithms.parameters import HEADS
from RL2.algorithms.reductions import token_weights, weighted_sum
from RL2.algorithms.segments import add_up, fault_of
from RL2.algorithms.token_loss import TokenLoss
from RL2.distributed import Traffic, broadcast, clip_gradients, rank, sum_over_ranks, world_size
from RL2.distributed.agreement import all_names, first_reason
from RL2.distributed.comm import Batch
from RL2.models.build import start_updates
from RL2.runtime.errors import TrainingError
from RL2.runtime.user_code import Unfit
from RL2.workers.metrics import merged, not_finite
from RL2.workers.packs import Pack, scatter_whole
from RL2.workers.parts import order_of, split_batch
from RL2.workers.schedule import schedule
from RL2.workers.sharded_model import ALWAYS, ShardedModel

logger = logging.getLogger(__name__)

_PACK_FIELDS = {
    "states",
    "lengths",
    "start",
    "positions",
    "pack",
}  # the others are [N], one per action token


class Learner(ShardedModel):
    """A model that is trained, with AdamW on fp32 weights and a learning rate schedule.

    A subclass may put more around the loss (`complete`, `scaled`, `total`), and say which batches
    cannot change its weights (`learns`), and which must not (`refuses`).

    Args:
        config: the learner's node, such as `actor`.
        device: this rank's device.
        name: the node's name, used for its metrics (`actor/...`) and in checkpoints.
        loss: what `update` minimises; it says which head the model has.
        max_bad_steps: non-finite updates in a row after which `update` raises.
        traffic: counts the bytes that cross ranks.
        seed: of the order of samples in several passes over a batch.

    Attributes:
        statistics: what the head computes besides what the loss takes.
        moved: whether an optimizer step on a part of the batch has already changed the weights.
        fault: what the loss did wrong on this rank; `update` then raises on all ranks.
    """

    statistics: tuple[str, ...] = ()

    def __init__(
        self,
        config,
        device: torch.device,
        name: str,
        loss: TokenLoss,
        max_bad_steps: int = 1,
        traffic: Traffic | None = None,
        seed: int = 0,
    ):
        super().__init__(config, device, traffic, head=loss.head, train=True, name=name)
        self.name = name
        self.loss = loss
        self.max_bad_steps = max_bad_steps
        self.seed = seed
        self.bad_steps = 0
        self.moved = False
        self.fault: str | None = None
        self.warned: set[str] = set()  # metrics of the loss reported as not finite
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler: LambdaLR | None = None

    @property
    def origin(self) -> str:
        """How errors of its loss begin, such as with the key that names the loss."""
        return self.loss.origin

    @property
    def segments(self) -> tuple[str, ...]:
        """The names in `RL2.algorithms.segments.SEGMENTS` that must not be cut; none if each token
        has a loss of its own."""
        return self.loss.segments

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a batch that `losses` reads if they are there."""
        return self.loss.fields

    def learns(self, batch: Batch) -> bool:
        """Rank 0: whether a batch with actions can change the weights."""
        return True

    def whole_batch_fields(self, batch: Batch) -> Batch:
        """Rank 0: the fields that only the whole of an optimizer batch gives: `loss_weights`, by
        which the losses of tokens are multiplied before they are summed, and `selected`."""
        mask, correct, samples = (batch[name] for name in ("action_mask", "correct", "sample_ids"))
        weights = token_weights(mask, correct, self.config.avg_level, samples)
        if self.loss.selection is None:
            return {"loss_weights": weights}
        selected = torch.zeros(batch["action_mask"].shape)
        if self.fault is None:
            try:
                selected = self.loss.selection(batch)["selections"].float()
            except Unfit as fault:
                self.fault = f"its selection: {fault}"
        return {"loss_weights": weights, "selected": selected}

    def complete(self, tokens: Batch) -> Batch:
        """Tokens with all fields that the loss may take."""
        return tokens

    def scaled(
        self, losses: Tensor, tokens: Batch, each: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Batch]:
        """The losses times what each weighs besides its part in the mean, and metrics of them, all
        `[n]`. each: from one value per token to one per loss."""
        return losses, {}

    def total(self, losses: Tensor, tokens: Batch) -> tuple[Tensor, Batch]:
        """The weighted sum of the losses `[N]` of this rank's tokens, with what each token adds,
        and the sums of metrics by full name."""
        return weighted_sum(losses, tokens["loss_weights"]), {}

    def refuses(self, totals: dict[str, float], n_actions: int) -> str | None:
        """Whether an optimizer step with these sums of metrics must not change the weights: the
        metric that counts such steps."""
        return None

    def scatter_update(self, batch: Batch | None, fields: tuple[str, ...]) -> list[Batch]:
        """This rank's micro-batches of rank 0's optimizer batch, for `to_device` and `losses`."""
        if self.segments:
            return scatter_whole(self, batch, fields, self.segments, self.loss.kind)
        return self.scatter(batch, fields, self.config.max_length_per_device)[0]

    def losses(self, micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the batch loss, with its gradient, and its sums over tokens
        for the metrics, by full name.

        Args:
            micro_batch: from `to_device`; weighted by `loss_weights [A]`, losses add up to the
                batch loss. It may have no tokens, but needs a backward: other ranks wait for it.

        A sum called `bad_losses` counts losses that were not finite, for the error's text.
        """
        wanted = tuple(dict.fromkeys((*self.loss.statistics, *self.statistics)))
        fields = {name: micro_batch[name] for name in micro_batch.keys() - _PACK_FIELDS}
        if self.segments:
            stats = self.forward(micro_batch, wanted, self.loss.top_k)
            return self._loss_of_segments(fields | stats, micro_batch["pack"])

        def loss_fn(stats: Batch, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            own = {name: field[rows] for name, field in fields.items()}
            return self._loss_of_tokens(own | stats)

        result = self.forward(micro_batch, wanted, self.loss.top_k, loss_fn)
        return result.pop("loss"), result

    def _loss_of_tokens(self, own: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the losses of some tokens, from their statistics and fields `[N]`, and
        the sums of their metrics."""
        tokens, weights = self.complete(own), own["loss_weights"]
        losses, metrics = self._call_loss(tokens, weights, lambda x: x)
        loss, sums = self.total(losses, own)
        return loss, sums | {name: values.sum() for name, values in metrics.items()}

    def _loss_of_segments(self, own: Batch, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for a loss of sequences, groups or pairs, which is called with all action tokens
        of a pack; each of the ranks that share the pack counts its part of the result.

        What `total` adds is that of this rank's `own` tokens.
        """
        kind, main = self.loss.kind, HEADS[self.loss.head][0]
        needed = {main, *self.loss.statistics}
        stats = pack.whole({name: own[name] for name in sorted(needed)})
        tokens = self.complete(pack.fields | stats) | pack.segments
        weights = add_up(tokens["loss_weights"], kind, pack.segments)
        each = pack.segments["sequences"].mean if kind == "sequences" else lambda x: x
        losses, metrics = self._call_loss(tokens, weights, each)
        loss = weighted_sum(losses, weights) / len(pack.sizes)

        more, sums = self.total(torch.zeros_like(own[main]), own)
        n_bad = metrics.pop("bad_losses").sum() / len(pack.sizes)
        share = pack.scale / len(pack.sizes)
        sums |= {name: values.double().sum() * share for name, values in metrics.items()}
        return loss + more, sums | {"bad_losses": n_bad}

    def _call_loss(
        self, tokens: Batch, weights: Tensor, each: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of some tokens, one for each of `weights`, and their metrics by full name;
        without tokens the loss is not called.

        After a fault a rank goes on without the loss, so that the others, which wait for its
        gradients, learn of it.
        """
        learned = tokens[HEADS[self.loss.head][0]]
        losses, metrics = learned.new_zeros(len(weights)), {}
        if len(weights) and self.fault is None:
            try:
                losses, metrics = self.loss(tokens)
            except Unfit as fault:
                self.fault = str(fault)
        if not losses.requires_grad:  # others wait for a backward
            everywhere = torch.ones_like(learned, dtype=torch.bool)
            losses = losses + learned.masked_fill(everywhere, 0.0).sum()
        bad = ~losses.detach().isfinite() & (weights != 0)
        losses, more = self.scaled(losses, tokens, each)
        named = {f"{self.name}/{name}": values for name, values in (metrics | more).items()}
        return losses, named | {"bad_losses": bad.to(weights)}

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps on one batch of the source."""
        return self.config.get("update_per_rollout", 1) * self._n_epochs

    @property
    def _n_epochs(self) -> int:
        return self.config.get("epochs_per_rollout", 1)

    def prepare_scheduler(self, n_updates: int, done: int = 0) -> None:
        """Warm-up and decay of the learning rate over `n_updates` optimizer steps, of which `done`
        were made."""
        self.n_updates = n_updates
        self.scheduler = schedule(self.optimizer, self.config, n_updates, done)

    def update(self, batch: Batch | None, step: int) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps on rank 0's batch; metrics on every rank.

        Of several passes over it, each is in an order of its own.

        `batch` is None on the other ranks, and on rank 0 if a rollout left nothing to train on. A
        step that cannot change the weights (no action, no correct sequence with
        `avg_level=correct`, `learns` says so) is skipped and counted in `<name>/skipped`; one whose
        loss or gradient is not finite is left out and counted in `<name>/nonfinite`, one that
        `refuses` names in the metric it gives.

        Raises:
            TrainingError: `max_bad_steps` non-finite updates in a row, or a loss that breaks
                `RL2.algorithms.contract`; on every rank.
        """
        if step <= self.config.freeze_steps:
            return {}
        if self.segments:
            self.check_segments(batch)
        self.load(optimizer=True)
        start_updates(self.model, self.config.dropout)
        rate = self.scheduler.get_last_lr()[0]
        self.moved = False
        metrics: list[dict[str, float]] = []
        for epoch in range(self._n_epochs):
            for part in self._parts(batch, step, epoch):
                metrics.append(self._optimizer_step(part))
                self.moved |= f"{self.name}/grad_norm" in metrics[-1]
        return merged(metrics, self.name) | {f"{self.name}/lr": rate}

    def _parts(self, batch: Batch | None, step: int, epoch: int) -> list[Batch | None]:
        """The optimizer batches of a pass over the batch."""
        n_parts = self.config.get("update_per_rollout", 1)
        if batch is None:
            return [None] * n_parts
        order = order_of(self.seed, step, epoch) if self._n_epochs > 1 else None
        return split_batch(batch, n_parts, self.segments, order)

    def shared(self, batch: Batch | None) -> tuple[Batch | None, int, tuple[str, ...]]:
        """Rank 0's batch from `_prepare`, and on every rank how many actions it has, 0 to skip it,
        and the fields that ranks need."""
        prepared = None
        if rank() == 0:
            batch, prepared = self._prepare(batch)
        n_actions, fields = broadcast(prepared) or (0, ())
        return batch, n_actions, fields

    def totals(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over all ranks, by name. A loss may have some on one rank only: elsewhere they count
        as 0. TrainingError on every rank if the loss broke its contract on one."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = sums | {"bad_calls": torch.full_like(zero, self.fault is not None)}
        names = all_names(sums)
        # One wait for the device for all metrics.
        totals = sum_over_ranks(torch.stack([sums.get(name, zero).double() for name in names]))
        totals = totals / self.layout.tp_size  # these ranks counted the same tokens
        totals = dict(zip(names, totals.tolist(), strict=True))
        if totals.pop("bad_calls"):
            self.optimizer.zero_grad()
            raise TrainingError(f"{self.origin}: {first_reason(self.fault)}")
        return totals

    def _optimizer_step(self, batch: Batch | None) -> dict[str, float]:
        batch, n_actions, fields = self.shared(batch)
        if not n_actions:
            return {f"{self.name}/skipped": 1.0}
        micro_batches = self.scatter_update(batch, fields)
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches, start=1):
            # Across replicas (HSDP) once per update; within a replica after every micro-batch, so
            # that no rank keeps whole gradients.
            self.model.set_requires_all_reduce(number == len(micro_batches))
            loss, metrics = self.losses(self.to_device(micro_batch))
            loss.backward()
            for name, value in (metrics | {f"{self.name}/loss": loss}).items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        grad_norm = self.clip_gradients()
        # The norm misses what one replica, or one tensor-parallel rank, has in parameters that
        # others hold as well. If it is not finite on one rank, all must skip.
        sums["bad_ranks"] = (~grad_norm.isfinite()).to(grad_norm)
        totals, norm = self.totals(sums), grad_norm.item()
        loss = totals[f"{self.name}/loss"]
        n_bad, n_ranks = totals.pop("bad_ranks") * self.layout.tp_size, world_size()
        if n_bad == n_ranks and self._may_be_overflow(loss):
            large = self.clip_large_gradients()
            n_bad, norm = sum_over_ranks((~large.isfinite()).to(large)).item(), large.item()
        if n_bad and math.isfinite(norm):
            norm = math.nan
        if (refused := self.refuses(totals, n_actions)) is not None:
            self.optimizer.zero_grad()
            return {refused: 1.0, f"{self.name}/skipped": 0.0}
        bad_losses = round(totals.pop("bad_losses", 0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._reject(loss, norm, bad_losses)
        self.bad_steps = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        means = {name: total / n_actions for name, total in totals.items()}
        own = {"loss": loss, "grad_norm": norm, "skipped": 0.0, "nonfinite": 0.0}
        return self._finite(means | {f"{self.name}/{name}": own[name] for name in own})

    def check_segments(self, batch: Batch | None) -> None:
        """TrainingError on every rank if rank 0's batch does not fit the segments of the loss."""
        reason = None
        if batch is not None:
            max_length = self.config.max_length_per_device * self.layout.sp_size
            reason = fault_of(batch, self.segments, max_length)
        if reason := broadcast(reason):
            raise TrainingError(f"{self.origin}: {reason}")

    def _may_be_overflow(self, loss: float) -> bool:
        """Whether a norm that is not finite may only be beyond float32 in its squares, while the
        squares of the clipped gradients, which AdamW takes, are within it."""
        return math.isfinite(loss) and self.config.max_grad_norm**2 < torch.finfo(torch.float32).max

    def _prepare(
        self, batch: Batch | None
    ) -> tuple[Batch | None, tuple[int, tuple[str, ...]] | None]:
        """Rank 0, before the first backward: the batch with the weights of its tokens' losses, how
        many actions it has, and the fields that ranks need; None instead of both to skip it."""
        level = self.config.avg_level
        if batch is None or not batch["action_mask"].any():
            return batch, None
        if not (batch["correct"].any() if level == "correct" else self.learns(batch)):
            return batch, None
        whole = self.whole_batch_fields(batch)
        batch = batch | whole
        fields = (*ALWAYS, *whole, *sorted({*self.fields} & batch.keys() - whole.keys()))
        return batch, (int(batch["action_mask"].sum()), fields)

    def clip_gradients(self) -> Tensor:
        """Complete the gradients and clip them to `max_grad_norm`; returns the norm before
        clipping, over all ranks."""
        for parameter in self.partial_gradients:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.to_local(), group=self.tp_group)
        return clip_gradients(self.model.parameters(), self.config.max_grad_norm)

    def clip_large_gradients(self) -> Tensor:
        """Clip in float64 what `clip_gradients` has left unchanged on every rank."""
        parameters = self.model.parameters()
        return clip_gradients(parameters, self.config.max_grad_norm, torch.float64)

    def _reject(self, loss: float, norm: float, bad_losses: int) -> dict[str, float]:
        """Leave out an update. bad_losses: how many losses that count were not finite."""
        self.optimizer.zero_grad()
        self.bad_steps += 1
        what = not_finite(loss, norm)
        if bad_losses:
            what += f"; {self.origin} returned {bad_losses} losses that were not"
        if self.bad_steps == 1:
            logger.warning(
                "%s: %s; this update was left out (%s/nonfinite)", self.name, what, self.name
            )
        if self.bad_steps >= self.max_bad_steps:
            raise TrainingError(
                f"{self.name}: {what} in the last of {self.bad_steps} updates in a row "
                f"(trainer.max_bad_steps) that had to be left out; lower {self.name}.lr or look at "
                "the last rollouts"
            )
        return {f"{self.name}/nonfinite": 1.0, f"{self.name}/skipped": 0.0}

    def _finite(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics without those of the loss that are not finite; warns once of each."""
        prefix = f"{self.name}/"
        bad = {
            name: value
            for name, value in metrics.items()
            if not math.isfinite(value) and name.removeprefix(prefix) not in RESERVED
        }
        for name in bad.keys() - self.warned:
            logger.warning(
                "%s: the mean of its metric %s is %s, which is left out of the step's metrics",
                self.origin, name.removeprefix(prefix), bad[name],
            )  # fmt: skip
        self.warned |= bad.keys()
        return {name: value for name, value in metrics.items() if name not in bad}

    def load(self, *, optimizer: bool = False) -> None:
        """Move the weights back to the device after `offload`, the moments only if `optimizer`."""
        super().load()
        if optimizer and self.config.offload_optimizer:
            _move_moments(self.optimizer, self.device)

    def offload(self) -> None:
        """Move weights and moments to CPU memory, as `offload_model` and `offload_optimizer` say.
        Only `load` may follow."""
        super().offload()
        if self.config.offload_optimizer:
            _move_moments(self.optimizer, torch.device("cpu"))


def _move_moments(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:  # the step count stays
                state[name] = value.to(device)
