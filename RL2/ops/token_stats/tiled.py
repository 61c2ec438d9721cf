"""Statistics of a linear head without its logits: vocabulary tile by vocabulary tile.

Two ways to the gradients:

* `tiled_token_stats` keeps six numbers per token and recomputes the logits in the backward pass:
  four matrix products, and the statistics may go into any function.
* `tiled_token_loss` is given the function: it takes a chunk of tokens at a time, forms the
  gradients while their logits are still there, and needs three. The function's normalisers have to
  be known beforehand.

In both, tokens whose statistics receive a gradient of exactly zero take no part in the products of
the backward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from RL2.ops.fp32 import worthwhile
from RL2.ops.token_stats import state as states
from RL2.ops.token_stats.kernels import EAGER, Kernels
from RL2.ops.token_stats.products import (
    add_product,
    gradient_dtype,
    half_operands,
    logits_dtype,
    product_into,
    rounds_to_half,
)
from RL2.ops.token_stats.stats import (
    NEG_INF,
    LossFunction,
    TokenStats,
    VocabularyShard,
    check_head,
    loss_of,
    statistics_dtype,
)


@dataclass(frozen=True)
class Tiling:
    """How much of `[T, V]` exists at a time.

    columns: of the vocabulary, the width of a tile.
    rows: tokens whose tile is multiplied and read in one go; on CPU it then stays in the cache.
    kept: `tiled_token_loss` keeps the logits of as many tokens as fill `[T, kept]`.
    fewest: where those are fewer than this, their products are slow, and it recomputes instead.

    The working memory, beyond the gradients themselves, is `[T, columns]` numbers for the one way
    and `[T, kept]` for the other.
    """

    columns: int = 4096
    rows: int = 512
    kept: int = 16384
    fewest: int = 256


# Measured on CPU (`benchmarks/RESULTS.md`): tiles of 8 MB in fp32 stay in the cache between the
# product and the kernel. On a GPU launches cost more than memory does: all rows at once.
TILINGS: dict[str, Tiling] = {
    "cpu": Tiling(),
    "cuda": Tiling(columns=8192, rows=2**20, kept=16384, fewest=512),
}


@dataclass(frozen=True)
class _Head:
    """One call's arguments: T tokens and the columns that this rank has. onednn: multiply with it;
    so do parts of a call that has enough to multiply."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    actions: Tensor
    scale: float
    entropy: bool
    top_k: int
    kernels: Kernels
    tiling: Tiling
    shard: VocabularyShard | None
    onednn: bool

    @property
    def dtype(self) -> torch.dtype:
        return statistics_dtype(self.hidden, self.weight)

    @property
    def start(self) -> int:
        return 0 if self.shard is None else self.shard.start

    @property
    def n_columns(self) -> int:
        return len(self.weight) if self.shard is None else self.shard.columns

    def tiles(self) -> Iterator[slice]:
        width = self.tiling.columns
        for a in range(0, self.n_columns, width):
            yield slice(a, min(a + width, self.n_columns))

    def row_blocks(self) -> Iterator[slice]:
        for a in range(0, len(self.hidden), self.tiling.rows):
            yield slice(a, min(a + self.tiling.rows, len(self.hidden)))

    def take(self, rows: slice | Tensor) -> "_Head":
        """The same for some of the tokens."""
        return replace(self, hidden=self.hidden[rows], actions=self.actions[rows])

    def scratch(self, n_rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for `[n_rows, columns]` numbers, flat, so that a narrower tile is contiguous."""
        width = min(self.tiling.columns, self.n_columns)
        return self.hidden.new_empty(n_rows * width, dtype=dtype or self.dtype)

    def operand(self, x: Tensor) -> Tensor:
        """Hidden states or weight as `logits` takes them."""
        return x.to(logits_dtype(self.hidden, self.weight, self.dtype))

    def logits(self, out: Tensor, hidden: Tensor, weight: Tensor, tile: slice) -> None:
        """Logits of a tile `[R, n]` from the operands of its rows and columns."""
        product_into(out, hidden, weight.T, self.onednn)
        if self.bias is not None:
            out.add_(self.bias[tile])


def tiled_token_stats(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    bias: Tensor | None = None,
    *,
    top_k: int = 0,
    kernels: Kernels = EAGER,
    tiling: Tiling | None = None,
    shard: VocabularyShard | None = None,
) -> TokenStats:
    """`linear_token_stats` without logits; the logits are computed again for the gradients.

    Without gradients (`torch.no_grad`, or nothing that requires one) nothing is kept for a
    backward pass.
    """
    head = _head(hidden, weight, actions, temperature, wanted, bias, top_k, kernels, tiling, shard)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        values = _Statistics.apply(hidden, weight, bias, head, tuple(wanted))
        return TokenStats(**dict(zip(wanted, values, strict=True)))
    return TokenStats(**_statistics(head, wanted)[0])


def tiled_token_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    loss_fn: LossFunction,
    bias: Tensor | None = None,
    *,
    top_k: int = 0,
    kernels: Kernels = EAGER,
    tiling: Tiling | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_token_loss` with the gradients formed while a chunk's logits are there.

    The logits of up to `T kept / V` tokens lie in a buffer. Rows that owe no gradient give their
    place to the next tokens, so that the products of the backward pass stay large however few
    tokens learn.

    It recomputes after all where that is faster: in half precision on CPU, whose operands have to
    be widened for every chunk and whose weight gradients rounded, and where the buffer would hold
    too few tokens (`Tiling.fewest`).
    """
    head = _head(hidden, weight, actions, temperature, wanted, bias, top_k, kernels, tiling, shard)
    if rounds_to_half(hidden, weight) or _room(head) < min(len(hidden), head.tiling.fewest):
        stats = tiled_token_stats(
            hidden, weight, actions, temperature, wanted, bias,
            top_k=top_k, kernels=kernels, tiling=tiling, shard=shard,
        )  # fmt: skip
        return loss_of(stats, len(hidden), loss_fn)
    trains = torch.is_grad_enabled()
    needs = [
        trains and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, metrics, gradients = _loss_and_gradients(head, wanted, loss_fn, needs)
    if not any(needs):
        return loss, metrics
    return _WithGradients.apply(loss, gradients, hidden, weight, bias), metrics


def _head(
    hidden, weight, actions, temperature, wanted, bias, top_k, kernels, tiling, shard
) -> _Head:
    check_head(hidden, weight, actions, temperature, wanted, top_k, shard)
    n_columns = len(weight) if shard is None else shard.columns
    return _Head(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        actions=actions,
        scale=1 / temperature,
        entropy="entropy" in wanted,
        top_k=top_k if "top_logps" in wanted else 0,
        kernels=kernels,
        tiling=tiling or TILINGS.get(hidden.device.type, Tiling()),
        shard=shard,
        onednn=worthwhile(hidden.device, hidden.numel() * n_columns),
    )


# --------------------------------------------------------------------------- values


@dataclass(frozen=True)
class _Seen:
    """What a sweep over the vocabulary leaves: the state, and the `top_k` largest z of a row.

    `top_index [T, K]` are columns of the whole vocabulary, -1 for padding. The first is the
    state's index also in a tie.
    """

    state: Tensor
    top_z: Tensor
    top_index: Tensor


def _sweep(head: _Head, kept: Sequence[Tensor] | None = None, fused: bool = False) -> _Seen:
    """One pass over the vocabulary; with `kept`, a `[T, n]` buffer per tile, logits stay there.

    With `fused` not even a tile of them is written.
    """
    n_tokens = len(head.hidden)
    device = head.hidden.device
    state = states.empty_state(n_tokens, head.dtype, device)
    top_z = torch.full((n_tokens, head.top_k), NEG_INF, dtype=head.dtype, device=device)
    top_index = torch.full((n_tokens, head.top_k), -1, device=device)
    if fused:
        columns = slice(0, head.n_columns)
        bias = None if head.bias is None else head.bias[columns]
        state = head.kernels.fused_state(
            head.hidden, head.weight[columns], bias, head.actions,
            head.start, head.scale, head.entropy,
        )  # fmt: skip
    for rows, start, z in () if fused else _tiles_of_logits(head, kept, fill=True):
        head.kernels.update_state(
            state[:, rows], z, head.actions[rows], start, head.scale, head.entropy
        )
        if head.top_k:
            top_z[rows], top_index[rows] = _merge_top(
                (top_z[rows], top_index[rows]), z, start, head.scale
            )
    if head.shard is not None:
        state = states.merge_all(head.shard.all_gather(state).unbind())
        if head.top_k:
            all_z = head.shard.all_gather(top_z).transpose(0, 1).flatten(1)
            all_index = head.shard.all_gather(top_index).transpose(0, 1).flatten(1)
            top_z, best = all_z.topk(head.top_k, -1)
            top_index = all_index.gather(-1, best)
    if head.top_k:  # in a tie topk may put another column first
        first = state[1].long().unsqueeze(-1)
        top_index = torch.where(top_index == first, top_index[:, :1], top_index)
        top_index[:, :1] = first
    return _Seen(state, top_z, top_index)


def _tiles_of_logits(
    head: _Head, kept: Sequence[Tensor] | None, fill: bool = False
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield `(rows, first column in the whole vocabulary, logits [R, n])`, tile by tile.

    Logits are computed into a buffer that the next ones overwrite, or with `fill` into `kept`
    (a `[T, n]` buffer per tile), or are read from there.
    """
    scratch = head.scratch(min(head.tiling.rows, len(head.hidden))) if kept is None else None
    compute = kept is None or fill
    operand = head.operand(head.hidden) if compute else None
    for t, tile in enumerate(head.tiles()):
        weight = head.operand(head.weight[tile]) if compute else None
        for rows in head.row_blocks():
            shape = (rows.stop - rows.start, tile.stop - tile.start)
            z = _view(scratch, shape) if kept is None else kept[t][rows]
            if compute:
                head.logits(z, operand[rows], weight, tile)
            yield rows, head.start + tile.start, z


def _merge_top(
    seen: tuple[Tensor, Tensor], logits: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor]:
    values, index = seen
    k = values.shape[1]
    new_values, new_index = logits.topk(min(k, logits.shape[1]), -1)
    values = torch.cat([values, new_values * scale], -1)
    index = torch.cat([index, new_index + start], -1)
    values, best = values.topk(k, -1)
    return values, index.gather(-1, best)


def _ranks(head: _Head, state: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
    """1 + the number of larger logits, `[T]`.

    Which logits are larger is only known once the action's is, so without `kept` logits this is a
    second pass. It makes the very products of the first one: others would round differently, and a
    token could outrank its equal.
    """
    chosen = state[5].unsqueeze(-1)
    above = torch.zeros_like(state[0])
    for rows, _, z in _tiles_of_logits(head, kept):
        above[rows] += (z * head.scale > chosen[rows]).sum(-1)
    if head.shard is not None:
        head.shard.all_reduce(above)
    return 1 + above


def _statistics(
    head: _Head, wanted: Sequence[str], kept: Sequence[Tensor] | None = None
) -> tuple[dict[str, Tensor], _Seen]:
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        # Ranks and top_logps compare logits with each other, so all have to come from one
        # kind of product.
        fused = head.kernels.fused_state is not None and kept is None and not head.top_k
        halves = half_operands(head.hidden, head.weight)
        seen = _sweep(head, kept, fused and halves and "ranks" not in wanted)
        values = states.statistics(seen.state, head.actions)
        if "ranks" in wanted:
            values["ranks"] = _ranks(head, seen.state, kept)
        if "top_logps" in wanted:
            top = seen.state[0].unsqueeze(-1)
            values["top_logps"] = (seen.top_z - top) + values["max_logps"].unsqueeze(-1)
    return {name: values[name] for name in wanted}, seen


# ------------------------------------------------------------------------ gradients


@dataclass(frozen=True)
class _Gradients:
    """Buffers that the gradients are written to; None for what needs none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class _Owed:
    """The upstream gradients of some tokens in the form that tiles take them."""

    coefficients: Tensor  # [7, R]
    top_gradients: Tensor  # [R, K], for the columns of top_index but the first
    top_index: Tensor

    def take(self, rows: slice | Tensor) -> "_Owed":
        return _Owed(self.coefficients[:, rows], self.top_gradients[rows], self.top_index[rows])


def _owed(head: _Head, seen: _Seen, upstream: Mapping[str, Tensor]) -> _Owed:
    top = upstream.get("top_logps", seen.top_z.new_zeros(len(head.hidden), 0))
    if top.shape[1]:
        top = top.masked_fill(seen.top_z == NEG_INF, 0.0)  # no such tokens
        upstream = {**upstream, "top_logps": top}
    coefficients = states.coefficients(seen.state, head.actions, upstream, head.scale)
    return _Owed(coefficients, top[:, 1:] * head.scale, seen.top_index[:, 1 : top.shape[1]])


def _rows_that_owe(upstream: Mapping[str, Tensor]) -> Tensor:
    """Indices of the tokens with an upstream gradient that is not exactly zero."""
    owes = [(g != 0).unsqueeze(-1).flatten(1).any(-1) for g in upstream.values()]
    return torch.stack(owes).any(0).nonzero().squeeze(-1)


def _add_gradients(
    head: _Head,
    owed: _Owed,
    into: _Gradients,
    kept: Sequence[Tensor] | None = None,
    accumulate: bool = False,
) -> None:
    """Gradients of `head`'s tokens: added to `into.hidden [R, H]`, written to (or with
    `accumulate` added to) the others, tile by tile, from logits that were `kept` or from new
    ones."""
    n_tokens, dtype = len(head.hidden), gradient_dtype(head.hidden, head.weight, head.dtype)
    operand = head.operand(head.hidden) if kept is None else None
    own_buffer = dtype != head.dtype  # else logits turn into gradients where they are
    buffer = head.scratch(n_tokens, dtype) if own_buffer or kept is None else None
    scratch = head.scratch(min(head.tiling.rows, n_tokens)) if own_buffer and kept is None else None
    hidden = head.hidden.to(dtype)
    for t, tile in enumerate(head.tiles()):
        weight = head.weight[tile]
        width = tile.stop - tile.start
        gradients = kept[t][:n_tokens] if buffer is None else _view(buffer, (n_tokens, width))
        as_operand = head.operand(weight) if kept is None else None
        start = head.start + tile.start
        for rows in head.row_blocks():
            out = gradients[rows]
            if kept is not None:
                z = kept[t][rows]
            else:
                z = out if scratch is None else _view(scratch, tuple(out.shape))
                head.logits(z, operand[rows], as_operand, tile)
            some = owed.take(rows)
            head.kernels.logit_gradients(
                out, z, some.coefficients, head.actions[rows], start, head.scale, head.entropy
            )
            if some.top_gradients.shape[1]:
                column = some.top_index - start
                inside = (column >= 0) & (column < width)
                added = torch.where(inside, some.top_gradients, 0.0).to(dtype)
                out.scatter_add_(-1, column.clamp(0, width - 1), added)
            if into.hidden is not None:
                add_product(into.hidden[rows], out, weight.to(dtype), head.onednn)
        if into.weight is not None:
            if accumulate:
                add_product(into.weight[tile], gradients.T, hidden, head.onednn)
            else:
                product_into(into.weight[tile], gradients.T, hidden, head.onednn)
        if into.bias is not None:
            total = gradients.sum(0, dtype=head.dtype)
            into.bias[tile] = into.bias[tile] + total if accumulate else total


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head: _Head, wanted: tuple[str, ...]):
        values, seen = _statistics(head, wanted)
        ctx.save_for_backward(hidden, weight, bias, seen.state, seen.top_z, seen.top_index)
        # Without its tensors, which autograd watches over (and FSDP frees and gathers again).
        ctx.head = replace(head, hidden=None, weight=None, bias=None)
        ctx.wanted = wanted
        if "ranks" in values:
            ctx.mark_non_differentiable(values["ranks"])
        ctx.set_materialize_grads(False)
        return tuple(values[name] for name in wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        hidden, weight, bias, *seen = ctx.saved_tensors
        head = replace(ctx.head, hidden=hidden, weight=weight, bias=bias)
        given = {
            name: gradient
            for name, gradient in zip(ctx.wanted, upstream, strict=True)
            if gradient is not None and name != "ranks"
        }
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            return *_gradients_of_statistics(head, _Seen(*seen), given, needs), None, None


def _gradients_of_statistics(
    head: _Head, seen: _Seen, upstream: Mapping[str, Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    head = replace(head, entropy="entropy" in upstream)
    n_tokens, dtype = len(head.hidden), gradient_dtype(head.hidden, head.weight, head.dtype)
    owed = _owed(head, seen, upstream)
    rows = _rows_that_owe(upstream) if upstream else head.actions[:0]
    if len(rows) < n_tokens:
        head, owed = head.take(rows), owed.take(rows)
    into = _buffers(head, needs, dtype)
    if len(rows):
        _add_gradients(head, owed, into)
    else:
        _clear(into)
    hidden = into.hidden
    if hidden is not None:
        if head.shard is not None:
            head.shard.all_reduce(hidden)
        if len(rows) < n_tokens:
            hidden = hidden.new_zeros(n_tokens, hidden.shape[1]).index_copy_(0, rows, hidden)
    return _in_types_of(head, hidden, into.weight, into.bias)


def _buffers(head: _Head, needs: Sequence[bool], weight_dtype: torch.dtype) -> _Gradients:
    """Zeros for hidden; weight and bias unwritten, but for what no tile will write."""
    hidden = torch.zeros_like(head.hidden, dtype=head.dtype) if needs[0] else None
    weight = torch.empty_like(head.weight, dtype=weight_dtype) if needs[1] else None
    bias = torch.empty_like(head.bias, dtype=head.dtype) if needs[2] else None
    for gradient in (weight, bias):
        if gradient is not None:
            gradient[head.n_columns :].zero_()
    return _Gradients(hidden, weight, bias)


def _in_types_of(head: _Head, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias in the types of those."""
    inputs = (head.hidden, head.weight, head.bias)
    return tuple(
        None if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, inputs, strict=True)
    )


def _clear(into: _Gradients) -> None:
    """What is right where no token owes anything."""
    for gradient in (into.weight, into.bias):
        if gradient is not None:
            gradient.zero_()


# ------------------------------------------------------- gradients in the forward pass


def _room(head: _Head) -> int:
    """How many tokens' logits the buffers hold; the same on all ranks of a group."""
    widest = head.n_columns if head.shard is None else head.shard.widest
    return min(len(head.hidden), len(head.hidden) * head.tiling.kept // widest)


def _loss_and_gradients(
    head: _Head, wanted: Sequence[str], loss_fn: LossFunction, needs: Sequence[bool]
) -> tuple[Tensor, dict[str, Tensor], _Gradients]:
    n_tokens, dtype = len(head.hidden), head.dtype
    into = _buffers(head, needs, dtype)
    trains = any(needs)
    room = _room(head) if trains else n_tokens
    buffers = [
        head.hidden.new_empty(room, tile.stop - tile.start, dtype=dtype) for tile in head.tiles()
    ] if trains else None  # fmt: skip
    loss = torch.zeros((), dtype=dtype, device=head.hidden.device)
    metrics: dict[str, Tensor] = {}
    waiting: list[tuple[Tensor, _Owed]] = []  # rows whose logits lie in the buffers
    done, filled, entropy, written = 0, 0, False, False
    while True:
        chunk = slice(done, min(n_tokens, done + room - filled))
        n_new = chunk.stop - chunk.start
        part = head.take(chunk)
        free = None if buffers is None else [b[filled : filled + n_new] for b in buffers]
        values, seen = _statistics(part, wanted, free)
        share, more, upstream = _call(loss_fn, values, chunk, trains)
        loss = loss + share
        metrics |= {name: metrics.get(name, 0.0) + value for name, value in more.items()}
        done = chunk.stop
        if upstream:
            entropy = entropy or "entropy" in upstream
            rows = _rows_that_owe(upstream)
            owed = _owed(part, seen, upstream)
            if len(rows) < n_new:
                owed = owed.take(rows)
                for buffer in free:
                    buffer[: len(rows)] = buffer[rows]
            waiting.append((rows + chunk.start, owed))
            filled += len(rows)
        if filled and (done == n_tokens or room - filled < max(1, room // 4)):
            _pay(replace(head, entropy=entropy), waiting, into, buffers, accumulate=written)
            waiting, filled, written = [], 0, True
        if done == n_tokens:
            break
    if not written:
        _clear(into)
    if into.hidden is not None and head.shard is not None:
        head.shard.all_reduce(into.hidden)
    gradients = _in_types_of(head, into.hidden, into.weight, into.bias)
    return loss, metrics, _Gradients(*gradients)


def _call(
    loss_fn: LossFunction, values: Mapping[str, Tensor], rows: slice, trains: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A chunk's loss, metrics and the loss's gradients with respect to the statistics."""
    leaves = {
        name: value.requires_grad_() if trains and name != "ranks" else value
        for name, value in values.items()
    }
    with torch.set_grad_enabled(trains):
        loss, metrics = loss_fn(TokenStats(**leaves), rows)
    upstream = {}
    if loss.requires_grad:
        names = [name for name in leaves if name != "ranks"]
        found = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
        upstream = {n: g for n, g in zip(names, found, strict=True) if g is not None}
    return loss.detach(), {name: value.detach() for name, value in metrics.items()}, upstream


def _pay(
    head: _Head,
    waiting: Sequence[tuple[Tensor, _Owed]],
    into: _Gradients,
    buffers: Sequence[Tensor],
    accumulate: bool,
) -> None:
    """Turn the logits in the buffers into gradients and multiply them."""
    rows = torch.cat([rows for rows, _ in waiting])
    owed = _Owed(
        torch.cat([one.coefficients for _, one in waiting], -1),
        torch.cat([one.top_gradients for _, one in waiting]),
        torch.cat([one.top_index for _, one in waiting]),
    )
    part = head.take(rows)
    share = replace(
        into,
        hidden=None if into.hidden is None else torch.zeros_like(part.hidden, dtype=head.dtype),
    )
    _add_gradients(part, owed, share, kept=buffers, accumulate=accumulate)
    if into.hidden is not None:
        into.hidden[rows] = share.hidden


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are already there."""

    @staticmethod
    def forward(ctx, loss, gradients: _Gradients, hidden, weight, bias):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_token_loss: its gradients were already handed out; "
                "call backward once, or use linear_token_stats"
            )
        found, ctx.gradients = ctx.gradients, None
        # In place: a copy of the weight's gradient would be the largest tensor around.
        scaled = [
            None if gradient is None else gradient.mul_(upstream.to(gradient.dtype))
            for gradient in (found.hidden, found.weight, found.bias)
        ]
        return None, None, *scaled


def _view(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    return flat[: shape[0] * shape[1]].view(shape)
