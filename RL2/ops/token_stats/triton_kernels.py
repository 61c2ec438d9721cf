"""The tile kernels of `RL2.ops.token_stats.kernels` in Triton: each reads a tile of logits once.

States are those of `RL2.ops.token_stats.state`. Rules for the arithmetic, also in `triton_fused`:

* No exponent is positive: nothing is summed before the `second` it is relative to is known.
* -inf (a masked column, or a maximum before the first one) is never subtracted from -inf: it adds
  exp(-inf) = 0 instead. A NaN wins no comparison, and shows as a NaN mass.
* z = logits * scale is rounded once, for all its uses (no contraction into z - second): equal
  logits stay equal, and the chosen one equals the maximum where it is the maximum.

The module needs triton: import it only where it is used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from RL2.ops.token_stats.state import LOWEST
from RL2.ops.token_stats.stats import NEG_INF

BLOCK = 2048  # columns that a program processes at a time
OPTIONS = {"enable_fp_fusion": False}  # no a * b - c in one rounding

MINUS_INF = tl.constexpr(NEG_INF)
LOWEST_GAP = tl.constexpr(LOWEST)


@triton.jit
def mass_and_moment(gap):
    """exp(gap) and exp(gap) * gap, both 0 at -inf; NaN stays NaN (a maximum alone may drop it)."""
    term = tl.exp(gap)
    return term, term * tl.maximum(gap, LOWEST_GAP)


@triton.jit
def rescaled(mass, moment, shift):
    """mass and moment relative to a second that is higher by -shift."""
    factor = tl.exp(shift)
    return factor * mass, factor * (moment + mass * tl.maximum(shift, LOWEST_GAP))


@triton.jit
def finite(second):
    return tl.where(second == MINUS_INF, 0.0, second)


@triton.jit
def second_of_both(top_l, second_l, top_h, second_h):
    """The smaller maximum becomes one of the other columns."""
    return tl.maximum(tl.maximum(second_l, second_h), tl.minimum(top_l, top_h))


@triton.jit
def load_state(state, stride, mask):
    return (
        tl.load(state, mask=mask),
        tl.load(state + stride, mask=mask),
        tl.load(state + 2 * stride, mask=mask),
        tl.load(state + 3 * stride, mask=mask),
        tl.load(state + 4 * stride, mask=mask),
        tl.load(state + 5 * stride, mask=mask),
    )


@triton.jit
def store_state(state, stride, mask, top, index, second, mass, moment, chosen):
    tl.store(state, top, mask=mask)
    tl.store(state + stride, index, mask=mask)
    tl.store(state + 2 * stride, second, mask=mask)
    tl.store(state + 3 * stride, mass, mask=mask)
    tl.store(state + 4 * stride, moment, mask=mask)
    tl.store(state + 5 * stride, chosen, mask=mask)


@triton.jit(do_not_specialize=["start"])
def _update_state_kernel(
    state,
    state_stride,
    state_row_stride,
    logits,
    logits_stride,
    actions,
    n,
    start,
    scale: tl.float64,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    state += row * state_row_stride
    logits += row * logits_stride
    top, index, second, mass, moment, chosen = load_state(state, state_stride, None)
    scale = tl.full((), scale, top.dtype)

    column = tl.load(actions + row) - start
    inside = (column >= 0) & (column < n)
    chosen = tl.maximum(chosen, tl.load(logits + column, mask=inside, other=MINUS_INF) * scale)

    # Sums of this tile, one per lane: in each block only the maximum is reduced over the lanes.
    masses = tl.zeros((BLOCK,), top.dtype)
    moments = tl.zeros((BLOCK,), top.dtype)
    for offset in range(0, n, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < n, other=MINUS_INF) * scale
        block_top = tl.max(z, 0)
        # Rare after the first blocks: most of a vocabulary is below the two largest so far.
        if block_top > second:
            block_index = tl.min(tl.where(z == block_top, columns, n), 0)
            others = tl.where(columns == block_index, MINUS_INF, z)
            higher = second_of_both(top, second, block_top, tl.max(others, 0))
            shift = second - finite(higher)
            mass, moment = rescaled(mass, moment, shift)
            masses, moments = rescaled(masses, moments, shift)
            second = higher
            if block_top > top:  # the old maximum enters the sums, the new one stays out
                term, term_moment = mass_and_moment(top - finite(second))
                mass += term
                moment += term_moment
                top = block_top
                index = (start + block_index).to(top.dtype)
                z = others
        terms, term_moments = mass_and_moment(z - finite(second))
        masses += terms
        moments += term_moments

    mass += tl.sum(masses, 0)
    moment += tl.sum(moments, 0)
    moment = moment if ENTROPY else 0.0
    store_state(state, state_stride, None, top, index, second, mass, moment, chosen)


@triton.jit(do_not_specialize=["start"])
def _logit_gradients_kernel(
    out,
    out_stride,
    logits,
    logits_stride,
    coefficients,
    coefficients_stride,
    coefficients_row_stride,
    actions,
    n,
    start,
    scale: tl.float64,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns; each element is read and written by one lane."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    coefficients += row * coefficients_row_stride
    top = tl.load(coefficients)
    index = tl.load(coefficients + coefficients_stride).to(tl.int64) - start
    second = tl.load(coefficients + 2 * coefficients_stride)
    slope_0 = tl.load(coefficients + 3 * coefficients_stride)
    at_top = tl.load(coefficients + 5 * coefficients_stride)
    at_chosen = tl.load(coefficients + 6 * coefficients_stride)
    action = tl.load(actions + row) - start

    scale = tl.full((), scale, top.dtype)
    z = tl.load(logits + row * logits_stride + columns, mask=inside, other=MINUS_INF) * scale
    gradient = tl.exp(z - second)
    if ENTROPY:
        slope_1 = tl.load(coefficients + 4 * coefficients_stride)
        gradient *= slope_0 + slope_1 * tl.maximum(z - top, LOWEST_GAP)
    else:
        gradient *= slope_0
    gradient += tl.where(columns == action, at_chosen, 0.0)
    gradient = tl.where(columns == index, at_top, gradient).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, gradient, mask=inside)


def update_state(
    state: Tensor, logits: Tensor, actions: Tensor, start: int, scale: float, entropy: bool
) -> None:
    """As `RL2.ops.token_stats.kernels.Kernels.update_state`."""
    check_layout(logits=logits)
    n_rows, n = logits.shape
    if logits.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        _update_state_kernel[(n_rows,)](
            state,
            *state.stride(),
            logits,
            logits.stride(0),
            actions.contiguous(),
            n,
            start,
            float(scale),
            ENTROPY=entropy,
            BLOCK=min(BLOCK, triton.next_power_of_2(n)),
            num_warps=4,
            **OPTIONS,
        )


def logit_gradients(
    out: Tensor,
    logits: Tensor,
    coefficients: Tensor,
    actions: Tensor,
    start: int,
    scale: float,
    entropy: bool,
) -> None:
    """As `RL2.ops.token_stats.kernels.Kernels.logit_gradients`."""
    check_layout(out=out, logits=logits)
    n_rows, n = logits.shape
    if logits.numel() == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(n))
    with torch.cuda.device_of(logits):
        _logit_gradients_kernel[(n_rows, triton.cdiv(n, block))](
            out,
            out.stride(0),
            logits,
            logits.stride(0),
            coefficients,
            *coefficients.stride(),
            actions.contiguous(),
            n,
            start,
            float(scale),
            ENTROPY=entropy,
            BLOCK=block,
            num_warps=4,
            **OPTIONS,
        )


def check_layout(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")
