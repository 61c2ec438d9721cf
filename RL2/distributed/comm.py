"""How a batch on rank 0 becomes packed micro-batches on every rank, and results come back.

A batch is a dict of right-padded `[B, T]` tensors with `lengths [B]` (see `RL2.datasets.base`).
A micro-batch is a dict of *flat* tensors: its rows, without padding, one after the other, with
their `lengths`. Only valid tokens travel, as tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from RL2.distributed.process_group import rank, world_size
from RL2.ops.packing import plan_packs

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ScatterPlan:
    """Which rows form which micro-batch, and on which rank.

    Attributes:
        packs: rows of each micro-batch; rank r owns the r-th run of `len(packs) / world size`
            packs. A pack may be empty: its rank then works on one filler token that owes
            nothing, because every rank must run the same number of forwards and backwards.
        lengths: tokens of each row of the batch.
    """

    packs: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    def of_rank(self, which: int, n_ranks: int) -> tuple[tuple[int, ...], ...]:
        per_rank = len(self.packs) // n_ranks
        return self.packs[which * per_rank : (which + 1) * per_rank]

    def pack_size(self, pack: tuple[int, ...]) -> int:
        """Tokens of a pack; an empty one holds a single filler token."""
        return sum(self.lengths[row] for row in pack) or 1


def broadcast(value: Any) -> Any:
    """Rank 0's small python object on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of a tensor over all ranks."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def _flatten(field: torch.Tensor, lengths: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    if not rows:
        return field.new_zeros(1)
    index = torch.tensor(rows)
    valid = torch.arange(field.shape[1]) < lengths[index, None]
    return field[index][valid]


def scatter(
    batch: Batch | None, fields: tuple[str, ...], max_length: int
) -> tuple[list[Batch], ScatterPlan]:
    """Spread rank 0's batch over all ranks as micro-batches of at most `max_length` tokens.

    Args:
        batch: `[B, T]` fields and `lengths [B]` on rank 0, ignored elsewhere.
        fields: names of the `[B, T]` fields that travel.
        max_length: tokens a micro-batch may hold.

    Returns:
        This rank's micro-batches in CPU memory (the same number on every rank), each holding flat
        `[N]` tensors of `fields` and `lengths [rows]`; and the plan that `gather` needs.
    """
    n_ranks, own = world_size(), rank()
    plan, dtypes = None, None
    if own == 0:
        lengths = batch["lengths"].tolist()
        plan = ScatterPlan(
            tuple(tuple(pack) for pack in plan_packs(lengths, max_length, multiple_of=n_ranks)),
            tuple(lengths),
        )
        dtypes = {field: batch[field].dtype for field in fields}
    plan, dtypes = broadcast((plan, dtypes))
    sizes = [sum(map(plan.pack_size, plan.of_rank(r, n_ranks))) for r in range(n_ranks)]

    received = {}
    for field in fields:
        shares = None
        if own == 0:
            shares = []
            for r in range(n_ranks):
                flat = torch.cat(
                    [_flatten(batch[field], batch["lengths"], p) for p in plan.of_rank(r, n_ranks)]
                )
                # dist.scatter wants equal shapes
                shares.append(torch.nn.functional.pad(flat, (0, max(sizes) - len(flat))))
        if n_ranks == 1:
            received[field] = shares[0]
        else:
            received[field] = torch.empty(max(sizes), dtype=dtypes[field])
            dist.scatter(received[field], shares, src=0)
        received[field] = received[field][: sizes[own]]

    packs = plan.of_rank(own, n_ranks)
    split = {
        field: flat.split([plan.pack_size(pack) for pack in packs])
        for field, flat in received.items()
    }
    return [
        {field: parts[i] for field, parts in split.items()}
        | {"lengths": torch.tensor([plan.lengths[row] for row in pack] or [1])}
        for i, pack in enumerate(packs)
    ], plan


def gather(values: list[torch.Tensor], plan: ScatterPlan) -> torch.Tensor | None:
    """Bring one flat `[N]` tensor per micro-batch back as `[B, T]` on rank 0 (None elsewhere)."""
    n_ranks = world_size()
    flat = torch.cat(values).cpu()
    sizes = [sum(map(plan.pack_size, plan.of_rank(r, n_ranks))) for r in range(n_ranks)]
    if n_ranks == 1:
        shares = [flat]
    else:
        flat = torch.nn.functional.pad(flat, (0, max(sizes) - len(flat)))
        shares = [torch.empty_like(flat) for _ in sizes] if rank() == 0 else None
        dist.gather(flat, shares, dst=0)
        if rank() != 0:
            return None
    out = flat.new_zeros(len(plan.lengths), max(plan.lengths))
    for r, share in enumerate(shares):
        start = 0
        for pack in plan.of_rank(r, n_ranks):
            offset = start
            for row in pack:
                length = plan.lengths[row]
                out[row, :length] = share[offset : offset + length]
                offset += length
            start += plan.pack_size(pack)
    return out
