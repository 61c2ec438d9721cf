"""From upstream gradients of the statistics to those of hidden states, weight and bias.

Tokens whose upstream gradients are exactly zero are left out of the products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from RL2.ops.token_stats import state as states
from RL2.ops.token_stats.products import add_product, gradient_dtype, product_into
from RL2.ops.token_stats.stats import NEG_INF
from RL2.ops.token_stats.sweep import SweepResult
from RL2.ops.token_stats.tiling import TiledHead, view


@dataclass(frozen=True)
class Gradients:
    """Buffers that the gradients are written to; None for inputs that need none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class TokenCoefficients:
    """The upstream gradients of some tokens, in the form that turns a tile's logits into
    gradients."""

    coefficients: Tensor  # [7, R]
    added: Tensor  # [R, K], to the gradients of the columns
    columns: Tensor  # of the whole vocabulary

    def take(self, rows: slice | Tensor) -> "TokenCoefficients":
        return TokenCoefficients(self.coefficients[:, rows], self.added[rows], self.columns[rows])


def token_coefficients(
    head: TiledHead, seen: SweepResult, upstream: Mapping[str, Tensor]
) -> TokenCoefficients:
    """The column of the maximum has a closed form for all gradients; at other columns those of
    `top_logps` and `at_logps` are added one by one."""
    given, columns = [], []
    for name, z, index in (
        ("top_logps", seen.top_z, seen.top_index), ("at_logps", seen.at_z, head.at),
    ):  # fmt: skip
        if z.shape[1]:
            gradient = upstream.get(name, torch.zeros_like(z))
            given.append(gradient.masked_fill(z == NEG_INF, 0.0))  # no such tokens
            columns.append(index)
    if not given:
        nothing = seen.top_z.new_zeros(len(head.hidden), 0)
        coefficients = states.coefficients(seen.state, head.actions, upstream, head.scale)
        return TokenCoefficients(coefficients, nothing, nothing.long())
    gradient, column = torch.cat(given, -1), torch.cat(columns, -1)
    is_top = column == seen.state[1].long().unsqueeze(-1)
    at_top, others = gradient.masked_fill(~is_top, 0.0), gradient.masked_fill(is_top, 0.0)
    upstream = {**upstream, "max_logps": upstream.get("max_logps", 0.0) + at_top.sum(-1)}
    coefficients = states.coefficients(
        seen.state, head.actions, upstream, head.scale, others.sum(-1)
    )
    return TokenCoefficients(coefficients, others * head.scale, column)


def rows_with_gradients(upstream: Mapping[str, Tensor]) -> Tensor:
    """Indices of the tokens with an upstream gradient that is not exactly zero."""
    nonzero = [(g != 0).unsqueeze(-1).flatten(1).any(-1) for g in upstream.values()]
    return torch.stack(nonzero).any(0).nonzero().squeeze(-1)


def add_gradients(
    head: TiledHead,
    per_token: TokenCoefficients,
    into: Gradients,
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
        gradients = kept[t][:n_tokens] if buffer is None else view(buffer, (n_tokens, width))
        as_operand = head.operand(weight) if kept is None else None
        start = head.start + tile.start
        for rows in head.row_blocks():
            out = gradients[rows]
            if kept is not None:
                z = kept[t][rows]
            else:
                z = out if scratch is None else view(scratch, tuple(out.shape))
                head.logits(z, operand[rows], as_operand, tile)
            some = per_token.take(rows)
            head.kernels.logit_gradients(
                out, z, some.coefficients, head.actions[rows], start, head.scale, head.entropy
            )
            if some.added.shape[1]:
                column = some.columns - start
                inside = (column >= 0) & (column < width)
                added = torch.where(inside, some.added, 0.0).to(dtype)
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


def gradient_buffers(
    head: TiledHead, needs: Sequence[bool], weight_dtype: torch.dtype
) -> Gradients:
    """Zeros for hidden; weight and bias uninitialised, except for parts that no tile will write."""
    hidden = torch.zeros_like(head.hidden, dtype=head.dtype) if needs[0] else None
    weight = torch.empty_like(head.weight, dtype=weight_dtype) if needs[1] else None
    bias = torch.empty_like(head.bias, dtype=head.dtype) if needs[2] else None
    for gradient in (weight, bias):
        if gradient is not None:
            gradient[head.n_columns :].zero_()
    return Gradients(hidden, weight, bias)


def in_types_of(head: TiledHead, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, in the types of these inputs."""
    inputs = (head.hidden, head.weight, head.bias)
    return tuple(
        None if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, inputs, strict=True)
    )


def zero_unwritten(into: Gradients) -> None:
    """Fill weight and bias with zeros, if no token has a gradient."""
    for gradient in (into.weight, into.bias):
        if gradient is not None:
            gradient.zero_()
