"""The tile kernels of `RL2.ops.token_stats.kernels` in Triton, and the forward pass as one kernel.

`update_state` and `logit_gradients` read a tile of logits once; `fused_state` makes the logits in
registers and stores none. States are those of `RL2.ops.token_stats.state`. Of the arithmetic:

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

from RL2.ops.token_stats.state import LOWEST, empty_state
from RL2.ops.token_stats.stats import NEG_INF

BLOCK = 2048  # columns that a program of the tile kernels takes at a time
_OPTIONS = {"enable_fp_fusion": False}  # no a * b - c in one rounding

_NEG_INF = tl.constexpr(NEG_INF)
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _terms(gap):
    """exp(gap) and exp(gap) * gap, both 0 at -inf; NaN stays NaN (a maximum alone may drop it)."""
    term = tl.exp(gap)
    return term, term * tl.maximum(gap, _LOWEST)


@triton.jit
def _rescaled(mass, moment, shift):
    """mass and moment relative to a second that is higher by -shift."""
    factor = tl.exp(shift)
    return factor * mass, factor * (moment + mass * tl.maximum(shift, _LOWEST))


@triton.jit
def _finite(second):
    return tl.where(second == _NEG_INF, 0.0, second)


@triton.jit
def _second_of_both(top_l, second_l, top_h, second_h):
    """The losing maximum is from now on one of the others."""
    return tl.maximum(tl.maximum(second_l, second_h), tl.minimum(top_l, top_h))


@triton.jit
def _load_state(state, stride, mask):
    return (
        tl.load(state, mask=mask),
        tl.load(state + stride, mask=mask),
        tl.load(state + 2 * stride, mask=mask),
        tl.load(state + 3 * stride, mask=mask),
        tl.load(state + 4 * stride, mask=mask),
        tl.load(state + 5 * stride, mask=mask),
    )


@triton.jit
def _store_state(state, stride, mask, top, index, second, mass, moment, chosen):
    tl.store(state, top, mask=mask)
    tl.store(state + stride, index, mask=mask)
    tl.store(state + 2 * stride, second, mask=mask)
    tl.store(state + 3 * stride, mass, mask=mask)
    tl.store(state + 4 * stride, moment, mask=mask)
    tl.store(state + 5 * stride, chosen, mask=mask)


@triton.jit
def _merged(
    top_l, index_l, second_l, mass_l, moment_l, chosen_l,
    top_h, index_h, second_h, mass_h, moment_h, chosen_h,
):  # fmt: skip
    """The state of both sets of columns; `_l` has the lower ones (for ties)."""
    second = _second_of_both(top_l, second_l, top_h, second_h)
    base = _finite(second)
    mass_l, moment_l = _rescaled(mass_l, moment_l, second_l - base)
    mass_h, moment_h = _rescaled(mass_h, moment_h, second_h - base)
    term, term_moment = _terms(tl.minimum(top_l, top_h) - base)
    return (
        tl.maximum(top_l, top_h),
        tl.where(top_h > top_l, index_h, index_l),
        second,
        mass_l + mass_h + term,
        moment_l + moment_h + term_moment,
        tl.maximum(chosen_l, chosen_h),
    )


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
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    state += row * state_row_stride
    logits += row * logits_stride
    top, index, second, mass, moment, chosen = _load_state(state, state_stride, None)
    scale = tl.full((), scale, top.dtype)

    column = tl.load(actions + row) - start
    inside = (column >= 0) & (column < n)
    chosen = tl.maximum(chosen, tl.load(logits + column, mask=inside, other=_NEG_INF) * scale)

    # Sums of this tile, one a lane: per block only its maximum is reduced over the lanes.
    masses = tl.zeros((BLOCK,), top.dtype)
    moments = tl.zeros((BLOCK,), top.dtype)
    for offset in range(0, n, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < n, other=_NEG_INF) * scale
        block_top = tl.max(z, 0)
        # Rare but for the first blocks: most of a vocabulary lies below the two largest so far.
        if block_top > second:
            block_index = tl.min(tl.where(z == block_top, columns, n), 0)
            others = tl.where(columns == block_index, _NEG_INF, z)
            higher = _second_of_both(top, second, block_top, tl.max(others, 0))
            shift = second - _finite(higher)
            mass, moment = _rescaled(mass, moment, shift)
            masses, moments = _rescaled(masses, moments, shift)
            second = higher
            if block_top > top:  # the old maximum enters the sums, the new one stays out
                term, term_moment = _terms(top - _finite(second))
                mass += term
                moment += term_moment
                top = block_top
                index = (start + block_index).to(top.dtype)
                z = others
        terms, term_moments = _terms(z - _finite(second))
        masses += terms
        moments += term_moments

    mass += tl.sum(masses, 0)
    moment += tl.sum(moments, 0)
    moment = moment if ENTROPY else 0.0
    _store_state(state, state_stride, None, top, index, second, mass, moment, chosen)


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
    """One program a row and block of columns; each element is read and written by one lane."""
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
    z = tl.load(logits + row * logits_stride + columns, mask=inside, other=_NEG_INF) * scale
    gradient = tl.exp(z - second)
    if ENTROPY:
        slope_1 = tl.load(coefficients + 4 * coefficients_stride)
        gradient *= slope_0 + slope_1 * tl.maximum(z - top, _LOWEST)
    else:
        gradient *= slope_0
    gradient += tl.where(columns == action, at_chosen, 0.0)
    gradient = tl.where(columns == index, at_top, gradient).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, gradient, mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "start"])
def _fused_state_kernel(
    states,
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    bias,
    actions,
    n_tokens,
    n_hidden,
    n_columns,
    columns_per_split,
    start,
    scale: tl.float64,
    HAS_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a block of tokens and split of the vocabulary, into `states[split]`.

    Programs that run together share a split, so that one of them brings its weights to the cache.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    inside = rows < n_tokens
    # What lies beyond the last row and column repeats it, so that only H needs masked loads.
    row = tl.minimum(rows, n_tokens - 1).to(tl.int64)
    action = tl.load(actions + row) - start
    scale = tl.full((), scale, tl.float32)
    ks = tl.arange(0, BLOCK_H)

    top = tl.full((BLOCK_T,), _NEG_INF, tl.float32)
    index = tl.full((BLOCK_T,), -1.0, tl.float32)
    second = tl.full((BLOCK_T,), _NEG_INF, tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    moment = tl.zeros((BLOCK_T,), tl.float32)
    chosen = tl.full((BLOCK_T,), _NEG_INF, tl.float32)

    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, n_columns)
    for offset in range(first, last, BLOCK_V):
        columns = offset + tl.arange(0, BLOCK_V)
        column = tl.minimum(columns, n_columns - 1).to(tl.int64)
        hidden_block = hidden + row[:, None] * hidden_stride + ks[None, :]
        weight_block = weight + column[None, :] * weight_stride + ks[:, None]
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, n_hidden, BLOCK_H):
            known = k + ks < n_hidden
            a = tl.load(hidden_block + k, mask=known[None, :], other=0.0)
            b = tl.load(weight_block + k, mask=known[:, None], other=0.0)
            z = tl.dot(a, b, z, input_precision="ieee")
        if HAS_BIAS:
            z += tl.load(bias + column).to(tl.float32)[None, :]
        z = tl.where((columns < last)[None, :], z * scale, _NEG_INF)

        block_top = tl.max(z, 1)
        is_top = z == block_top[:, None]
        block_index = tl.min(tl.where(is_top, columns[None, :], n_columns), 1)
        others = tl.where(columns[None, :] == block_index[:, None], _NEG_INF, z)
        block_second = tl.max(others, 1)
        terms, term_moments = _terms(others - _finite(block_second)[:, None])
        is_chosen = columns[None, :] == action[:, None]
        block_chosen = tl.max(tl.where(is_chosen, z, _NEG_INF), 1)
        top, index, second, mass, moment, chosen = _merged(
            top, index, second, mass, moment, chosen,
            block_top, (start + block_index).to(tl.float32), block_second,
            tl.sum(terms, 1), tl.sum(term_moments, 1), block_chosen,
        )  # fmt: skip

    if not ENTROPY:
        moment = tl.zeros((BLOCK_T,), tl.float32)
    states += split.to(tl.int64) * 6 * n_tokens + rows
    _store_state(states, n_tokens, inside, top, index, second, mass, moment, chosen)


@triton.jit(do_not_specialize=["n_splits", "n_tokens"])
def _merge_splits_kernel(states, n_splits, n_tokens, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """`merge_all` of `states [n_splits, 6, T]` in one launch, into the first of them."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_tokens
    states += rows
    top, index, second, mass, moment, chosen = _load_state(states, n_tokens, inside)
    others = states
    for _ in range(1, n_splits):
        others += 6 * n_tokens
        top_h, index_h, second_h, mass_h, moment_h, chosen_h = _load_state(others, n_tokens, inside)
        top, index, second, mass, moment, chosen = _merged(
            top, index, second, mass, moment, chosen,
            top_h, index_h, second_h, mass_h, moment_h, chosen_h,
        )  # fmt: skip
    if not ENTROPY:
        moment = tl.zeros((BLOCK,), tl.float32)
    _store_state(states, n_tokens, inside, top, index, second, mass, moment, chosen)


def update_state(
    state: Tensor, logits: Tensor, actions: Tensor, start: int, scale: float, entropy: bool
) -> None:
    """As `RL2.ops.token_stats.kernels.Kernels.update_state`."""
    _check_layout(logits=logits)
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
            **_OPTIONS,
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
    _check_layout(out=out, logits=logits)
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
            **_OPTIONS,
        )


def _configs(*shapes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Of (tokens, columns, hidden, warps, stages)."""
    return [
        triton.Config(
            {"BLOCK_T": tokens, "BLOCK_V": columns, "BLOCK_H": hidden},
            num_warps=warps,
            num_stages=stages,
        )
        for tokens, columns, hidden, warps, stages in shapes
    ]


_HALF = _configs((128, 128, 64, 8, 4), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4))
_CONFIGS = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
    torch.float32: _configs((64, 64, 32, 4, 3), (128, 64, 32, 8, 3)),  # no tensor cores
}
if triton.knobs.runtime.interpret:  # cannot time, and multiplies bf16 as if it were integers
    del _CONFIGS[torch.bfloat16]
    _CONFIGS = {dtype: configs[:1] for dtype, configs in _CONFIGS.items()}
_FUSED = {
    dtype: triton.autotune(configs, key=["n_hidden", "n_columns"])(_fused_state_kernel)
    for dtype, configs in _CONFIGS.items()
}
# Columns of a split are a multiple of every BLOCK_V.
_SPLIT = 256


def fused_state(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    start: int,
    scale: float,
    entropy: bool,
) -> Tensor:
    """The state `[6, T]` of `hidden @ weight.T + bias`, of which not even a tile is stored.

    Args:
        hidden: `[T, H]` in bf16, fp16 or fp32; sums are fp32, and so is the product of fp32.
        weight: `[V, H]` of the same dtype: columns start, start + 1, … of the vocabulary.
        bias: `[V]` or None.
        actions, start, scale, entropy: as for `update_state`.

    Raises:
        ValueError: an unsupported dtype, or a last dimension that is not contiguous.
    """
    _check_layout(hidden=hidden, weight=weight)
    if hidden.dtype not in _FUSED or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden {hidden.dtype}, weight {weight.dtype}: expected one of {list(_FUSED)}"
        )
    n_tokens, n_hidden = hidden.shape
    n_columns = len(weight)
    if n_tokens == 0 or n_columns == 0:
        return empty_state(n_tokens, torch.float32, hidden.device)
    columns_per_split = _columns_per_split(n_tokens, n_columns, hidden.device)
    n_splits = triton.cdiv(n_columns, columns_per_split)
    states = hidden.new_empty(n_splits, 6, n_tokens, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        _FUSED[hidden.dtype][lambda meta: (triton.cdiv(n_tokens, meta["BLOCK_T"]), n_splits)](
            states,
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            bias if bias is None else bias.contiguous(),
            actions.contiguous(),
            n_tokens,
            n_hidden,
            n_columns,
            columns_per_split,
            start,
            float(scale),
            HAS_BIAS=bias is not None,
            ENTROPY=entropy,
            **_OPTIONS,
        )
        if n_splits > 1:
            _merge_splits_kernel[(triton.cdiv(n_tokens, 128),)](
                states, n_splits, n_tokens, ENTROPY=entropy, BLOCK=128, **_OPTIONS
            )
    return states[0]


def _columns_per_split(n_tokens: int, n_columns: int, device: torch.device) -> int:
    """Splits for about four programs a multiprocessor, so that the last wave costs little."""
    if device.type == "cuda":
        programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        programs = 4
    splits = max(1, programs // triton.cdiv(n_tokens, 128))
    return _SPLIT * triton.cdiv(n_columns, _SPLIT * splits)


def _check_layout(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")
