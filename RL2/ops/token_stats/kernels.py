"""The element-wise work on one tile of logits, eager or through torch.compile.

Both are the same two functions; `RL2.ops.token_stats.triton_kernels` has them in Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from RL2.ops.token_stats.state import LOWEST, merge
from RL2.ops.token_stats.stats import NEG_INF

# Elements of a tile that eager kernels process at a time, so that temporaries stay in the cache.
_EAGER_BLOCK = 2**18


@dataclass(frozen=True)
class Kernels:
    """Two functions over a tile: columns `start`, `start + 1`, … of the vocabulary.

    `logits [R, n]` are fp32 (fp64), their last dimension contiguous; `z = logits * scale`.
    `actions [R]` count over the whole vocabulary.

    update_state(state, logits, actions, start, scale, entropy): merge the tile into `state [6, R]`
        (see `RL2.ops.token_stats.state`), in place. Without `entropy` its moment stays 0.
    logit_gradients(out, logits, coefficients, actions, start, scale, entropy): the gradient of
        every logit into `out [R, n]`, which may be `logits` itself or a buffer of fewer bits.
        `coefficients [7, R]` are top, index, second, slope_0, slope_1, at_top, at_chosen:

            column index    at_top
            column j        exp(z_j - second) (slope_0 + slope_1 (z_j - top)), at_chosen added if j
                            is the action; slope_1 is not read without `entropy`
    fused_state(hidden, weight, bias, actions, start, scale, entropy): the state of all columns
        directly from half-precision operands, without a tile of logits. Optional.
    """

    update_state: Callable[..., None]
    logit_gradients: Callable[..., None]
    fused_state: Callable[..., Tensor] | None = None


def _tile_state(logits, actions, start: int, scale: float, entropy: bool) -> Tensor:
    z = logits * scale
    top, index = z.max(-1)  # the first of equal maxima
    columns = torch.arange(z.shape[1], dtype=torch.int32, device=z.device)
    others = z.masked_fill(columns == index.int().unsqueeze(-1), NEG_INF)
    second = others.amax(-1)
    base = second.masked_fill(second == NEG_INF, 0.0).unsqueeze(-1)
    gaps = others - base
    weights = gaps.exp()
    moment = (weights * gaps.clamp(min=LOWEST)).sum(-1) if entropy else torch.zeros_like(top)
    column = actions - start
    inside = (column >= 0) & (column < z.shape[1])
    chosen = z.gather(-1, column.clamp(0, z.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    return torch.stack(
        [
            top,
            (index + start).to(z.dtype),
            second,
            weights.sum(-1),
            moment,
            torch.where(inside, chosen, NEG_INF),
        ]
    )


def _update_state(state, logits, actions, start: int, scale: float, entropy: bool) -> None:
    state.copy_(merge(state, _tile_state(logits, actions, start, scale, entropy)))


def _logit_gradients(
    out, logits, coefficients, actions, start: int, scale: float, entropy: bool
) -> None:
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    top, index, second, slope_0, slope_1, at_top, at_chosen = coefficients.unsqueeze(-1)
    z = logits * scale
    factor = slope_0 + slope_1 * (z - top).clamp(min=LOWEST) if entropy else slope_0
    gradients = (z - second).exp() * factor
    gradients = gradients + torch.where(
        columns == (actions - start).int().unsqueeze(-1), at_chosen, 0.0
    )
    out.copy_(torch.where(columns == (index - start).int(), at_top, gradients))


def _blocks(logits: Tensor) -> list[slice]:
    rows = max(1, _EAGER_BLOCK // max(1, logits.shape[1]))
    return [slice(a, a + rows) for a in range(0, len(logits), rows)]


def _eager_update_state(state, logits, actions, start, scale, entropy) -> None:
    for rows in _blocks(logits):
        _update_state(state[:, rows], logits[rows], actions[rows], start, scale, entropy)


def _eager_logit_gradients(out, logits, coefficients, actions, start, scale, entropy) -> None:
    for rows in _blocks(logits):
        _logit_gradients(
            out[rows], logits[rows], coefficients[:, rows], actions[rows], start, scale, entropy
        )


def _logit_gradients_in_place(logits, *arguments) -> None:
    _logit_gradients(logits, logits, *arguments)


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call, as importing the compiler takes two seconds.

    Sizes of 1, strides, types and `entropy` each need a version of their own. Beyond the limit
    torch would silently run eagerly.
    """
    return torch.compile(function, dynamic=True, recompile_limit=64)


def _compiled_update_state(*arguments) -> None:
    _compiled(_update_state)(*arguments)


def _compiled_logit_gradients(out, logits, *arguments) -> None:
    # Do not pass one tensor twice: torch 2.13 miscomputes two arguments that are the same part of a
    # larger buffer, and its cache on disk then does so for separate buffers too.
    if out.data_ptr() == logits.data_ptr():
        _compiled(_logit_gradients_in_place)(logits, *arguments)
    else:
        _compiled(_logit_gradients)(out, logits, *arguments)


EAGER = Kernels(_eager_update_state, _eager_logit_gradients)
COMPILED = Kernels(_compiled_update_state, _compiled_logit_gradients)
