"""The forward pass as one Triton kernel: it computes the logits in registers and stores none.

The module needs triton: import it only where it is used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from RL2.ops.token_stats.state import empty_state
from RL2.ops.token_stats.triton_kernels import (
    MINUS_INF,
    OPTIONS,
    check_layout,
    finite,
    load_state,
    mass_and_moment,
    rescaled,
    second_of_both,
    store_state,
)


@triton.jit
def _merged(
    top_l, index_l, second_l, mass_l, moment_l, chosen_l,
    top_h, index_h, second_h, mass_h, moment_h, chosen_h,
):  # fmt: skip
    """The state of both sets of columns; `_l` has the lower ones (for ties)."""
    second = second_of_both(top_l, second_l, top_h, second_h)
    base = finite(second)
    mass_l, moment_l = rescaled(mass_l, moment_l, second_l - base)
    mass_h, moment_h = rescaled(mass_h, moment_h, second_h - base)
    term, term_moment = mass_and_moment(tl.minimum(top_l, top_h) - base)
    return (
        tl.maximum(top_l, top_h),
        tl.where(top_h > top_l, index_h, index_l),
        second,
        mass_l + mass_h + term,
        moment_l + moment_h + term_moment,
        tl.maximum(chosen_l, chosen_h),
    )


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
    """One program per block of tokens and split of the vocabulary, into `states[split]`.

    Programs that run together share a split, so that its weights are loaded into the cache once.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    inside = rows < n_tokens
    # Rows and columns beyond the last repeat it, so that only H needs masked loads.
    row = tl.minimum(rows, n_tokens - 1).to(tl.int64)
    action = tl.load(actions + row) - start
    scale = tl.full((), scale, tl.float32)
    ks = tl.arange(0, BLOCK_H)

    top = tl.full((BLOCK_T,), MINUS_INF, tl.float32)
    index = tl.full((BLOCK_T,), -1.0, tl.float32)
    second = tl.full((BLOCK_T,), MINUS_INF, tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    moment = tl.zeros((BLOCK_T,), tl.float32)
    chosen = tl.full((BLOCK_T,), MINUS_INF, tl.float32)

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
        z = tl.where((columns < last)[None, :], z * scale, MINUS_INF)

        block_top = tl.max(z, 1)
        is_top = z == block_top[:, None]
        block_index = tl.min(tl.where(is_top, columns[None, :], n_columns), 1)
        others = tl.where(columns[None, :] == block_index[:, None], MINUS_INF, z)
        block_second = tl.max(others, 1)
        terms, term_moments = mass_and_moment(others - finite(block_second)[:, None])
        is_chosen = columns[None, :] == action[:, None]
        block_chosen = tl.max(tl.where(is_chosen, z, MINUS_INF), 1)
        top, index, second, mass, moment, chosen = _merged(
            top, index, second, mass, moment, chosen,
            block_top, (start + block_index).to(tl.float32), block_second,
            tl.sum(terms, 1), tl.sum(term_moments, 1), block_chosen,
        )  # fmt: skip

    if not ENTROPY:
        moment = tl.zeros((BLOCK_T,), tl.float32)
    states += split.to(tl.int64) * 6 * n_tokens + rows
    store_state(states, n_tokens, inside, top, index, second, mass, moment, chosen)


@triton.jit(do_not_specialize=["n_splits", "n_tokens"])
def _merge_splits_kernel(states, n_splits, n_tokens, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """`merge_all` of `states [n_splits, 6, T]` in one launch, into the first of them."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_tokens
    states += rows
    top, index, second, mass, moment, chosen = load_state(states, n_tokens, inside)
    others = states
    for _ in range(1, n_splits):
        others += 6 * n_tokens
        top_h, index_h, second_h, mass_h, moment_h, chosen_h = load_state(others, n_tokens, inside)
        top, index, second, mass, moment, chosen = _merged(
            top, index, second, mass, moment, chosen,
            top_h, index_h, second_h, mass_h, moment_h, chosen_h,
        )  # fmt: skip
    if not ENTROPY:
        moment = tl.zeros((BLOCK,), tl.float32)
    store_state(states, n_tokens, inside, top, index, second, mass, moment, chosen)


def _configs(*shapes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Configs from (tokens, columns, hidden, warps, stages)."""
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
if triton.knobs.runtime.interpret:  # it cannot time, and multiplies bf16 as integers
    del _CONFIGS[torch.bfloat16]
    _CONFIGS = {dtype: configs[:1] for dtype, configs in _CONFIGS.items()}
_FUSED = {
    dtype: triton.autotune(configs, key=["n_hidden", "n_columns"])(_fused_state_kernel)
    for dtype, configs in _CONFIGS.items()
}
# The columns of a split are a multiple of every BLOCK_V.
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
    """The state `[6, T]` of `hidden @ weight.T + bias`, without storing even a tile of it.

    Args:
        hidden: `[T, H]` in bf16, fp16 or fp32; sums are fp32, and so are products of fp32.
        weight: `[V, H]` of the same dtype: columns start, start + 1, … of the vocabulary.
        bias: `[V]` or None.
        actions, start, scale, entropy: as for `update_state`.

    Raises:
        ValueError: an unsupported dtype, or a last dimension that is not contiguous.
    """
    check_layout(hidden=hidden, weight=weight)
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
            **OPTIONS,
        )
        if n_splits > 1:
            _merge_splits_kernel[(triton.cdiv(n_tokens, 128),)](
                states, n_splits, n_tokens, ENTROPY=entropy, BLOCK=128, **OPTIONS
            )
    return states[0]


def _columns_per_split(n_tokens: int, n_columns: int, device: torch.device) -> int:
    """Splits for about four programs per multiprocessor, so that the last wave costs little."""
    if device.type == "cuda":
        programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        programs = 4
    splits = max(1, programs // triton.cdiv(n_tokens, 128))
    return _SPLIT * triton.cdiv(n_columns, _SPLIT * splits)
