"""A loss whose gradients are formed in the forward pass, while a chunk's logits exist.

There are three matrix products. The normalisers of the loss must be known beforehand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from RL2.ops.token_stats.gradients import (
    Gradients,
    TokenCoefficients,
    add_gradients,
    gradient_buffers,
    in_types_of,
    rows_with_gradients,
    token_coefficients,
    zero_unwritten,
)
from RL2.ops.token_stats.kernels import EAGER, Kernels
from RL2.ops.token_stats.products import rounds_to_half
from RL2.ops.token_stats.recompute import tiled_token_stats
from RL2.ops.token_stats.stats import (
    CONSTANT,
    LossFunction,
    TokenStats,
    VocabularyShard,
    loss_of,
)
from RL2.ops.token_stats.sweep import sweep_statistics
from RL2.ops.token_stats.tiling import TiledHead, Tiling, tiled_head


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
    at: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_token_loss` with the gradients formed while a chunk's logits exist.

    The logits of up to `T kept / V` tokens are in a buffer. Rows that receive no gradient are
    replaced by the next tokens, so that the products of the backward pass stay large even if few
    tokens have gradients.

    It recomputes the logits if that is faster: in half precision on CPU, where operands must be
    widened and weight gradients rounded for every chunk, and if the buffer would hold too few
    tokens (`Tiling.fewest`).
    """
    head = tiled_head(
        hidden, weight, actions, temperature, wanted, bias, top_k, kernels, tiling, shard, at
    )
    if rounds_to_half(hidden, weight) or _room(head) < min(len(hidden), head.tiling.fewest):
        stats = tiled_token_stats(
            hidden, weight, actions, temperature, wanted, bias,
            top_k=top_k, kernels=kernels, tiling=tiling, shard=shard, at=at,
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


def _room(head: TiledHead) -> int:
    """How many tokens' logits the buffers hold; the same on all ranks of a group."""
    widest = head.n_columns if head.shard is None else head.shard.widest
    return min(len(head.hidden), len(head.hidden) * head.tiling.kept // widest)


def _loss_and_gradients(
    head: TiledHead, wanted: Sequence[str], loss_fn: LossFunction, needs: Sequence[bool]
) -> tuple[Tensor, dict[str, Tensor], Gradients]:
    n_tokens, dtype = len(head.hidden), head.dtype
    into = gradient_buffers(head, needs, dtype)
    trains = any(needs)
    room = _room(head) if trains else n_tokens
    buffers = [
        head.hidden.new_empty(room, tile.stop - tile.start, dtype=dtype) for tile in head.tiles()
    ] if trains else None  # fmt: skip
    loss = torch.zeros((), dtype=dtype, device=head.hidden.device)
    metrics: dict[str, Tensor] = {}
    waiting: list[tuple[Tensor, TokenCoefficients]] = []  # rows whose logits are in the buffers
    done, filled, entropy, written = 0, 0, False, False
    while True:
        chunk = slice(done, min(n_tokens, done + room - filled))
        n_new = chunk.stop - chunk.start
        part = head.take(chunk)
        free = None if buffers is None else [b[filled : filled + n_new] for b in buffers]
        values, seen = sweep_statistics(part, wanted, free)
        share, more, upstream = _call(loss_fn, values, chunk, trains)
        loss = loss + share
        metrics |= {name: metrics.get(name, 0.0) + value for name, value in more.items()}
        done = chunk.stop
        if upstream:
            entropy = entropy or "entropy" in upstream
            rows = rows_with_gradients(upstream)
            per_token = token_coefficients(part, seen, upstream)
            if len(rows) < n_new:
                per_token = per_token.take(rows)
                for buffer in free:
                    buffer[: len(rows)] = buffer[rows]
            waiting.append((rows + chunk.start, per_token))
            filled += len(rows)
        if filled and (done == n_tokens or room - filled < max(1, room // 4)):
            _add_waiting_gradients(
                replace(head, entropy=entropy), waiting, into, buffers, accumulate=written
            )
            waiting, filled, written = [], 0, True
        if done == n_tokens:
            break
    if not written:
        zero_unwritten(into)
    if into.hidden is not None and head.shard is not None:
        head.shard.all_reduce(into.hidden)
    gradients = in_types_of(head, into.hidden, into.weight, into.bias)
    return loss, metrics, Gradients(*gradients)


def _call(
    loss_fn: LossFunction, values: Mapping[str, Tensor], rows: slice, trains: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A chunk's loss, metrics and the loss's gradients with respect to the statistics."""
    leaves = {
        name: value.requires_grad_() if trains and name not in CONSTANT else value
        for name, value in values.items()
    }
    with torch.set_grad_enabled(trains):
        loss, metrics = loss_fn(TokenStats(**leaves), rows)
    upstream = {}
    if loss.requires_grad:
        names = [name for name in leaves if name not in CONSTANT]
        found = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
        upstream = {n: g for n, g in zip(names, found, strict=True) if g is not None}
    return loss.detach(), {name: value.detach() for name, value in metrics.items()}, upstream


def _add_waiting_gradients(
    head: TiledHead,
    waiting: Sequence[tuple[Tensor, TokenCoefficients]],
    into: Gradients,
    buffers: Sequence[Tensor],
    accumulate: bool,
) -> None:
    """Turn the logits in the buffers into gradients and multiply them."""
    rows = torch.cat([rows for rows, _ in waiting])
    per_token = TokenCoefficients(
        torch.cat([one.coefficients for _, one in waiting], -1),
        torch.cat([one.added for _, one in waiting]),
        torch.cat([one.columns for _, one in waiting]),
    )
    part = head.take(rows)
    share = replace(
        into,
        hidden=None if into.hidden is None else torch.zeros_like(part.hidden, dtype=head.dtype),
    )
    add_gradients(part, per_token, share, kept=buffers, accumulate=accumulate)
    if into.hidden is not None:
        into.hidden[rows] = share.hidden


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are already computed."""

    @staticmethod
    def forward(ctx, loss, gradients: Gradients, hidden, weight, bias):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_token_loss: its gradients were already used; "
                "call backward only once, or use linear_token_stats"
            )
        found, ctx.gradients = ctx.gradients, None
        # In place: a copy of the weight's gradient would be the largest tensor in memory.
        scaled = [
            None if gradient is None else gradient.mul_(upstream.to(gradient.dtype))
            for gradient in (found.hidden, found.weight, found.bias)
        ]
        return None, None, *scaled
