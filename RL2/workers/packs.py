"""Micro-batches with whole sequences, groups or pairs, for losses that need them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from RL2.algorithms.segments import (
    SEGMENTS,
    Pairs,
    Segments,
    count,
    kept_together,
    segments_of,
)
from RL2.distributed.comm import Batch, broadcast, scatter, whole_packs
from RL2.distributed.sequence_parallel import of_all_slices
from RL2.workers.sharded_model import ShardedModel


@dataclass(frozen=True, eq=False)
class Pack:
    """What a loss gets of a micro-batch besides statistics, on all ranks that share it.

    Attributes:
        fields: the fields of all action tokens of the pack, `[N]` each.
        segments: its `sequences`, and `groups` and `pairs` if the loss names them.
        sizes: how many of the N tokens each of those ranks has.
        group: the process group of those ranks; None for one.
        scale: the factor for the sum of a metric with one value per element of the loss's kind, as
            the learner divides it by the action tokens of the whole batch.
    """

    fields: Batch
    segments: dict[str, Segments | Pairs]
    sizes: list[int]
    group: dist.ProcessGroup | None
    scale: float

    def whole(self, statistics: Batch) -> Batch:
        """From statistics of this rank's action tokens, those of all N tokens of the pack. All
        ranks compute the same loss from them; each must take `1 / len(sizes)` of it."""
        if self.group is None:
            return statistics
        columns = [x.unsqueeze(-1).flatten(1) for x in statistics.values()]
        table = of_all_slices(torch.cat(columns, -1), self.sizes, self.group)
        parts = table.split([x.shape[1] for x in columns], -1)
        return {
            name: part.reshape(-1, *x.shape[1:])
            for (name, x), part in zip(statistics.items(), parts, strict=True)
        }


def scatter_whole(
    model: ShardedModel,
    batch: Batch | None,
    fields: tuple[str, ...],
    names: tuple[str, ...],
    kind: str,
) -> list[Batch]:
    """This rank's micro-batches of rank 0's batch, each with its `pack` on the device.

    Args:
        model: the model whose ranks share the work.
        fields: the fields of the batch to send.
        names: the names in `SEGMENTS` that must not be cut.
        kind: what the loss returns one value for, a key of `KINDS`.
    """
    scale = broadcast(None if batch is None else count(batch, "tokens") / count(batch, kind))
    units = None if batch is None else kept_together(batch, names)
    row_fields = tuple(field for name in names for field in SEGMENTS[name])
    micro_batches, _ = scatter(
        batch, fields, model.config.max_length_per_device, model.layout, model.attention_cost,
        model.traffic, row_fields, units,
    )  # fmt: skip
    group = model.model.sp_group
    of_tokens = tuple(name for name in fields if name not in ("states", "actions"))
    packs = whole_packs(micro_batches, of_tokens, group)
    for micro_batch, whole in zip(micro_batches, packs, strict=True):
        mask = whole.pop("action_mask")
        action = mask.nonzero().squeeze(-1)
        n_slices = 1 if group is None else dist.get_world_size(group)
        sizes = mask.view(n_slices, -1).sum(-1).tolist()
        rows = {name: micro_batch.pop(name) for name in row_fields}
        row = torch.searchsorted(micro_batch["lengths"].cumsum(0), action, right=True)
        pack = Pack(
            {name: x[action].to(model.device, non_blocking=True) for name, x in whole.items()},
            segments_of(row, rows, names, model.device),
            sizes,
            group,
            scale,
        )
        micro_batch["pack"] = pack
    return micro_batches
