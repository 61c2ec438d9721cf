"""How a batch on rank 0 becomes packed micro-batches on every rank, and results come back.

A batch is a dict of right-padded `[B, T]` tensors with `lengths [B]` (see `RL2.datasets.base`).
Fields with several numbers per token are `[B, T, K]`. A micro-batch is a dict of *flat* tensors:
its rows, without padding, one after the other, or this rank's slice of that. Only valid tokens are
sent, as one buffer of bytes for each rank; one index, computed once, says where each token goes.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.distributed.mesh import Layout
from RL2.distributed.process_group import rank, world_size
from RL2.distributed.traffic import Traffic
from RL2.ops.packing import plan_packs
from RL2.ops.ragged import ranges

# A micro-batch also has `start`, an int.
Batch = dict[str, Tensor]

# Numbered, so that a field's dtype can be sent as an integer.
_DTYPES = (
    torch.int64, torch.float64, torch.int32, torch.float32, torch.float16, torch.bfloat16,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


class Form(NamedTuple):
    """What a field is: its dtype, the one in which it is sent, and how many numbers a token has, 0
    if it is `[B, T]`."""

    dtype: torch.dtype
    wire: torch.dtype
    columns: int

    @property
    def n_bytes(self) -> int:
        """Bytes of a token as it is sent."""
        return max(1, self.columns) * self.wire.itemsize

    def view(self, received: Tensor) -> Tensor:
        """The field of the tokens whose bytes these are."""
        values = received.view(self.wire).to(self.dtype)
        return values.view(-1, self.columns) if self.columns else values


@dataclass(frozen=True, eq=False)
class ScatterPlan:
    """Which rows form which micro-batch, and on which ranks.

    A *pack* is some rows, one after the other, and filler tokens that do not count in the loss.
    They make it divisible by `sp_size` and not empty, as every rank must run the same number of
    forwards and backwards. Pack p is the (p // dp_size)-th micro-batch of data-parallel place
    p % dp_size, whose sequence-parallel ranks hold consecutive slices of it, of equal size.

    Attributes:
        lengths: `[B]` number of tokens of each row of the batch.
        rows: `[B]` the rows of the first pack, in order, then those of the second, ...
        counts: `[n_packs]` number of rows of each pack.
        layout: how the ranks share the tokens.
    """

    lengths: Tensor
    rows: Tensor
    counts: Tensor
    layout: Layout = field(default_factory=Layout)

    @classmethod
    def make(
        cls,
        lengths: Tensor,
        max_length: int,
        layout: Layout,
        quadratic: float = 0.0,
        units: Tensor | None = None,
    ) -> "ScatterPlan":
        """See `plan_packs`, also for what it raises; `max_length` is per device."""
        whole = None if units is None else units.tolist()
        packs = plan_packs(
            lengths.tolist(), max_length * layout.sp_size, layout.dp_size, quadratic, whole
        )
        rows = torch.tensor([row for pack in packs for row in pack], dtype=torch.int64)
        return cls(lengths, rows, torch.tensor([len(pack) for pack in packs]), layout)

    @cached_property
    def tokens(self) -> Tensor:
        """`[n_packs]` number of tokens of each pack without its filler."""
        pack_of_row = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)
        tokens = torch.zeros(len(self.counts), dtype=torch.int64)
        return tokens.index_add_(0, pack_of_row, self.lengths[self.rows])

    @cached_property
    def slice_sizes(self) -> Tensor:
        """`[n_packs]` number of tokens of each slice of a pack."""
        sp_size = self.layout.sp_size
        return (self.tokens.clamp(min=1) + sp_size - 1) // sp_size

    @cached_property
    def fillers(self) -> Tensor:
        """`[n_packs]` number of filler tokens at the end of each pack."""
        return self.slice_sizes * self.layout.sp_size - self.tokens

    @cached_property
    def share_sizes(self) -> list[int]:
        """Number of tokens of each rank's share: its slices of its packs, one after the other."""
        of_place = self.slice_sizes.view(-1, self.layout.dp_size).sum(0).tolist()
        return [of_place[self.layout.coordinates(r)[0]] for r in range(self.layout.world_size)]

    def slices(self, which: int) -> list[tuple[int, Tensor, int]]:
        """A rank's slices as (size, lengths, start): `lengths` of the whole pack's sequences, with
        the filler as one more; `start` is the slice's first token in the pack."""
        dp, sp, _ = self.layout.coordinates(which)
        lengths = self.lengths[self.rows].split(self.counts.tolist())
        sizes, fillers = self.slice_sizes.tolist(), self.fillers[:, None]
        return [
            (sizes[p], torch.cat([lengths[p], fillers[p][fillers[p] > 0]]), sp * sizes[p])
            for p in range(dp, len(sizes), self.layout.dp_size)
        ]

    def index(self, width: int) -> Tensor:
        """The position of each token of the shares in the flattened `[B, width]` batch, beyond its
        end for filler: the shares of all places (dp, sp), one after the other."""
        layout, n_packs = self.layout, len(self.counts)
        # In the stream of all packs: rows and fillers, and where the slices begin.
        pack_ends = (self.slice_sizes * layout.sp_size).cumsum(0)
        lengths = torch.cat([self.lengths[self.rows], self.fillers])
        source = torch.cat([self.rows * width, torch.full((n_packs,), len(self.rows) * width)])
        pack = torch.arange(n_packs)
        order = torch.cat([pack.repeat_interleave(self.counts), pack]).argsort(stable=True)
        order = order[lengths[order] > 0]
        lengths, source = lengths[order], source[order]
        starts = lengths.cumsum(0) - lengths
        sizes = self.slice_sizes.repeat_interleave(layout.sp_size)
        slice_starts = sizes.cumsum(0) - sizes

        # Cut at both, and sort the pieces by place and turn.
        cuts = torch.cat([starts, slice_starts]).unique()
        lengths = torch.cat([cuts, pack_ends[-1:]]).diff()
        piece = torch.searchsorted(starts, cuts, right=True) - 1
        which = torch.searchsorted(slice_starts, cuts, right=True) - 1
        pack, sp = which // layout.sp_size, which % layout.sp_size
        place = pack % layout.dp_size * layout.sp_size + sp
        order = (place * n_packs + pack).argsort(stable=True)
        return ranges((source[piece] + cuts - starts[piece])[order], lengths[order])


def broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's small python object on every rank. group: all ranks; None: the default group."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Element-wise sum of a tensor over all ranks. group: all ranks; None: the default group."""
    if world_size() > 1:
        dist.all_reduce(values, group=group)
    return values


def scatter(
    batch: Batch | None,
    fields: tuple[str, ...],
    max_length: int,
    layout: Layout | None = None,
    quadratic: float = 0.0,
    traffic: Traffic | None = None,
    row_fields: tuple[str, ...] = (),
    units: Tensor | None = None,
) -> tuple[list[Batch], ScatterPlan]:
    """Spread rank 0's batch over all ranks as micro-batches of at most `max_length` tokens.

    Args:
        batch: `[B, T]` and `[B, T, K]` fields and `lengths [B]` on rank 0, ignored elsewhere.
        fields: names of those fields to send.
        max_length: maximum tokens of a micro-batch on a rank; a pack has up to `sp_size` times as
            many.
        layout: how the ranks share the tokens; None: data parallelism over all ranks.
        quadratic: see `plan_packs`.
        traffic: counts the bytes, under the name `scatter`.
        row_fields: names of `[B]` int64 or bool fields to send to every rank.
        units: `[B]` on rank 0; rows with the same number share a pack. None: each row on its own.

    Returns:
        This rank's micro-batches in CPU memory (the same number on every rank), and the plan that
        `gather` needs. Each holds flat `[n]` or `[n, K]` tensors of `fields`, this rank's slice of
        a pack; `lengths`, those of the whole pack's sequences, filler included; the int `start`,
        the first token of the slice in the pack; and int64 `[rows]` of `row_fields`, of the whole
        pack's rows.
    """
    layout = layout or Layout(world_size=world_size())
    plan = None
    if rank() == 0:
        plan = ScatterPlan.make(batch["lengths"].cpu(), max_length, layout, quadratic, units)
    plan, forms, of_rows = _share_plan(batch, fields, plan, layout, traffic, row_fields)
    # The bytes of the fields, one after the other, wide dtypes first, so that all are aligned.
    n_bytes = [size * sum(form.n_bytes for form in forms.values()) for size in plan.share_sizes]
    width = -(-max(n_bytes) // 8) * 8  # dist.scatter wants equal shapes

    buffers = _fill_buffers(batch, forms, plan, width) if rank() == 0 else None
    if layout.world_size == 1:
        received = buffers[0]
    else:
        received = torch.empty(width, dtype=torch.uint8)
        dist.scatter(received, buffers, src=0)
    if traffic is not None:
        traffic.add("scatter", width * (layout.world_size - 1))

    slices = plan.slices(rank())
    sizes = [size for size, _, _ in slices]
    split, offset = {}, 0
    for name, form in forms.items():
        n = sum(sizes) * form.n_bytes
        split[name] = form.view(received[offset : offset + n]).split(sizes)
        offset += n
    place, _, _ = layout.coordinates(rank())
    own_rows = plan.rows.split(plan.counts.tolist())[place :: layout.dp_size]
    return [
        {name: split[name][i] for name in fields}
        | {"lengths": lengths, "start": start}
        | {name: field[rows] for name, field in of_rows.items()}
        for i, ((_, lengths, start), rows) in enumerate(zip(slices, own_rows, strict=True))
    ], plan


def whole_packs(
    micro_batches: list[Batch], fields: tuple[str, ...], group: dist.ProcessGroup | None
) -> list[Batch]:
    """The `fields` of each micro-batch's whole pack, whose slices are on the ranks of a
    sequence-parallel group (a collective); without a group, those of the micro-batch itself."""
    if group is None:
        return [{name: one[name] for name in fields} for one in micro_batches]
    whole: list[Batch] = [{} for _ in micro_batches]
    for name in fields:
        own = torch.cat([one[name] for one in micro_batches])
        slices = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather([x.view(torch.uint8) for x in slices], own.view(torch.uint8), group=group)
        cut = [x.split([len(one[name]) for one in micro_batches]) for x in slices]
        for target, of_ranks in zip(whole, zip(*cut, strict=True), strict=True):
            target[name] = torch.cat(of_ranks)
    return whole


def _share_plan(
    batch: Batch | None,
    fields: tuple[str, ...],
    plan: ScatterPlan | None,
    layout: Layout,
    traffic: Traffic | None,
    row_fields: tuple[str, ...],
) -> tuple[ScatterPlan, dict[str, Form], Batch]:
    """Rank 0's plan on every rank, the form of each field, the widest dtype first, and the
    `row_fields`."""
    header = torch.zeros(2 + 3 * len(fields), dtype=torch.int64)
    of_rows = {}
    if rank() == 0:
        of_rows = {name: batch[name].to("cpu", torch.int64) for name in row_fields}
        own = [batch[name].dtype for name in fields]
        wire = [_wire_dtype(batch[name]) for name in fields]
        codes = [_DTYPES.index(dtype) for dtype in own + wire]
        columns = [batch[name].shape[2] if batch[name].dim() > 2 else 0 for name in fields]
        header = torch.tensor([len(plan.lengths), len(plan.counts), *codes, *columns])
    if layout.world_size > 1:
        dist.broadcast(header, src=0)
        n_rows, n_packs = header[:2].tolist()
        sizes = [n_rows, n_rows, n_packs, *[n_rows] * len(row_fields)]
        tables = torch.empty(sum(sizes), dtype=torch.int64)
        if rank() == 0:
            torch.cat([plan.lengths, plan.rows, plan.counts, *of_rows.values()], out=tables)
        dist.broadcast(tables, src=0)
        lengths, rows, counts, *rest = tables.split(sizes)
        plan = ScatterPlan(lengths, rows, counts, layout)
        of_rows = dict(zip(row_fields, rest, strict=True))
        if traffic is not None:
            traffic.add("scatter", 8 * (len(header) + len(tables)) * (layout.world_size - 1))
    codes = header[2:].view(3, -1).T.tolist()
    forms = {
        name: Form(_DTYPES[own], _DTYPES[wire], columns)
        for name, (own, wire, columns) in zip(fields, codes, strict=True)
    }
    return plan, dict(sorted(forms.items(), key=lambda item: -item[1].wire.itemsize)), of_rows


def _wire_dtype(values: Tensor) -> torch.dtype:
    """int32 for integers that fit (token ids do), else the tensor's own."""
    if values.dtype != torch.int64 or not values.numel():
        return values.dtype
    limits = torch.iinfo(torch.int32)
    low, high = values.aminmax()
    return torch.int32 if limits.min <= low and high <= limits.max else torch.int64


def _fill_buffers(
    batch: Batch, forms: dict[str, Form], plan: ScatterPlan, width: int
) -> list[Tensor]:
    """`[width]` bytes for each rank; tensor-parallel ranks share theirs."""
    layout = plan.layout
    n_places = layout.world_size // layout.tp_size
    flat = {name: batch[name].to(form.wire).flatten(0, 1) for name, form in forms.items()}
    index = plan.index(batch[next(iter(flat))].shape[1])
    end = len(next(iter(flat.values())))
    of_places = torch.empty(n_places, width, dtype=torch.uint8)
    for share, source in zip(
        of_places, index.split(plan.share_sizes[:: layout.tp_size]), strict=True
    ):
        filler = (source >= end).nonzero().squeeze(1)
        source = source.clamp(max=end - 1)
        offset = 0
        for name, values in flat.items():
            n = len(source) * forms[name].n_bytes
            target = share[offset : offset + n].view(values.dtype).view(-1, *values.shape[1:])
            torch.index_select(values, 0, source, out=target)
            target.index_fill_(0, filler, 0)
            offset += n
    return [of_places[r // layout.tp_size] for r in range(layout.world_size)]


def gather(
    values: list[Tensor], plan: ScatterPlan, traffic: Traffic | None = None
) -> Tensor | None:
    """Bring one flat `[n]` or `[n, K]` tensor per micro-batch back as `[B, T]` or `[B, T, K]` on
    rank 0 (None elsewhere), where T is the longest row's number of tokens.

    Tensor-parallel ranks have the same values, so only the first of each group sends them.
    traffic: counts the bytes, under the name `gather`.
    """
    layout = plan.layout
    sizes = [0 if r % layout.tp_size else size for r, size in enumerate(plan.share_sizes)]
    flat = torch.cat(values).cpu()[: sizes[rank()]]
    flat = concatenate_on_rank_0(flat, sizes)
    if traffic is not None:
        columns = values[0].shape[1:].numel()
        traffic.add("gather", sum(sizes[1:]) * columns * values[0].itemsize)
    if flat is None:
        return None
    n_rows, n_tokens = len(plan.lengths), int(plan.lengths.max())
    # filler goes to the end
    out = flat.new_zeros(n_rows * n_tokens + layout.sp_size, *flat.shape[1:])
    out.index_copy_(0, plan.index(n_tokens), flat)
    return out[: n_rows * n_tokens].unflatten(0, (n_rows, n_tokens))


def concatenate_on_rank_0(
    values: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None
) -> Tensor | None:
    """All ranks' `[sizes[rank], …]` CPU tensors of one dtype, one after the other, on rank 0 (None
    elsewhere). No padding is sent; ranks without values send nothing."""
    own = 0 if len(sizes) == 1 else dist.get_rank(group)
    if own != 0:
        if sizes[own]:
            dist.send(values.contiguous(), group=group, group_dst=0)
        return None
    if len(sizes) == 1:
        return values
    result = values.new_empty(sum(sizes), *values.shape[1:])
    parts = result.split(sizes)
    parts[0].copy_(values)
    requests = [
        dist.irecv(part, group=group, group_src=r)
        for r, part in enumerate(parts)
        if r and len(part)
    ]
    for request in requests:
        request.wait()
    return result
