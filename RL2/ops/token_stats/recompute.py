"""Statistics with gradients whose backward pass recomputes the logits.

Six numbers per token are kept. There are four matrix products, and any function may use the
statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from RL2.ops.token_stats.gradients import (
    add_gradients,
    gradient_buffers,
    in_types_of,
    rows_with_gradients,
    token_coefficients,
    zero_unwritten,
)
from RL2.ops.token_stats.kernels import EAGER, Kernels
from RL2.ops.token_stats.products import gradient_dtype
from RL2.ops.token_stats.stats import CONSTANT, TokenStats, VocabularyShard
from RL2.ops.token_stats.sweep import SweepResult, sweep_statistics
from RL2.ops.token_stats.tiling import TiledHead, Tiling, tiled_head


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
    at: Tensor | None = None,
) -> TokenStats:
    """`linear_token_stats` without stored logits, which are recomputed for the gradients.

    Without gradients (`torch.no_grad`, or no input that requires one) nothing is kept for a
    backward pass.
    """
    head = tiled_head(
        hidden, weight, actions, temperature, wanted, bias, top_k, kernels, tiling, shard, at
    )
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        values = _Statistics.apply(hidden, weight, bias, head, tuple(wanted))
        return TokenStats(**dict(zip(wanted, values, strict=True)))
    return TokenStats(**sweep_statistics(head, wanted)[0])


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head: TiledHead, wanted: tuple[str, ...]):
        values, seen = sweep_statistics(head, wanted)
        ctx.save_for_backward(
            hidden, weight, bias, seen.state, seen.top_z, seen.top_index, seen.at_z
        )
        # Without its tensors, which autograd keeps (and FSDP frees and gathers again).
        ctx.head = replace(head, hidden=None, weight=None, bias=None)
        ctx.wanted = wanted
        ctx.mark_non_differentiable(*[values[name] for name in CONSTANT if name in values])
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
            if gradient is not None and name not in CONSTANT
        }
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            return *_gradients_of_statistics(head, SweepResult(*seen), given, needs), None, None


def _gradients_of_statistics(
    head: TiledHead, seen: SweepResult, upstream: Mapping[str, Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    head = replace(head, entropy="entropy" in upstream)
    n_tokens, dtype = len(head.hidden), gradient_dtype(head.hidden, head.weight, head.dtype)
    per_token = token_coefficients(head, seen, upstream)
    rows = rows_with_gradients(upstream) if upstream else head.actions[:0]
    if len(rows) < n_tokens:
        head, per_token = head.take(rows), per_token.take(rows)
    into = gradient_buffers(head, needs, dtype)
    if len(rows):
        add_gradients(head, per_token, into)
    else:
        zero_unwritten(into)
    hidden = into.hidden
    if hidden is not None:
        if head.shard is not None:
            head.shard.all_reduce(hidden)
        if len(rows) < n_tokens:
            hidden = hidden.new_zeros(n_tokens, hidden.shape[1]).index_copy_(0, rows, hidden)
    return in_types_of(head, hidden, into.weight, into.bias)
