"""The four matrix products of a head: half-precision operands, fp32 results.

Logits rounded to bf16 would cause errors of 0.1 in log(1 - p), so they are accumulated and stored
in fp32 whatever the operands. Their gradients may be rounded to bf16 with bf16 operands: each then
has an independent relative error of 2^-9, and sums over thousands of them a much smaller one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from RL2.ops import fp32

_HALF = (torch.bfloat16, torch.float16)


def half_operands(hidden: Tensor, weight: Tensor) -> bool:
    """Whether both are of the same half-precision type."""
    return hidden.dtype == weight.dtype and hidden.dtype in _HALF


def logits_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type of the operands of the logits; on CUDA they may be half with an fp32 result."""
    return hidden.dtype if hidden.is_cuda and half_operands(hidden, weight) else dtype


def gradient_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of the logits are multiplied with hidden states and weight.

    Not fp16, in which the small ones vanish.
    """
    bf16 = half_operands(hidden, weight) and hidden.dtype == torch.bfloat16
    return torch.bfloat16 if bf16 else dtype


def rounds_to_half(hidden: Tensor, weight: Tensor) -> bool:
    """Whether products of gradients have a half-precision result, as in torch on CPU."""
    return not hidden.is_cuda and gradient_dtype(hidden, weight, torch.float32) in _HALF


def product_into(out: Tensor, a: Tensor, b: Tensor, onednn: bool = False) -> None:
    """out = a @ b, accumulated in fp32 and stored in the type of `out`.

    onednn: multiply with oneDNN if it is faster (see `RL2.ops.fp32`). A single row or column is
    rounded as it would be among others.
    """
    if onednn and fp32.multiplies(a, b, out):
        several = fp32.product(_at_least_two(a), _at_least_two(b.T).T)
        out.copy_(several[: out.shape[0], : out.shape[1]])
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_product(out: Tensor, a: Tensor, b: Tensor, onednn: bool = False) -> None:
    """out += a @ b, accumulated in the type of `out` (on CPU, see `rounds_to_half`).

    onednn: see `product_into`.
    """
    if onednn and fp32.multiplies(a, b, out):
        out.add_(fp32.product(a, b))
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b))


def _at_least_two(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, 1)) if len(rows) == 1 else rows
