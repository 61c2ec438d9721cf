"""Fast fp32 matrix products on CPUs.

torch multiplies fp32 matrices with MKL, which reaches less than half of oneDNN's speed on AMD's
CPUs (`benchmarks/RESULTS.md`). torch's switch to oneDNN concerns every product of the process, also
the many tiny ones inside of attention, which it makes slow. So the backbone's linear layers ask for
oneDNN by its operator, and only the head, which is large products alone, uses the switch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Products of fewer rows take longer to set up than to compute.
_MIN_ROWS = 16
# Multiplications that take a millisecond.
_MANY = 2**26


def accelerate_linears(model: nn.Module) -> None:
    """Let the linear layers of a model multiply with oneDNN where they are in fp32 on a CPU.

    Their class is replaced, in place; parameters, names and hooks stay. Not for layers that are
    going to be compiled, as torch's compiler chooses the products itself.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not _suits(x, weight):
            return F.linear(x, weight, bias)
        if torch.is_grad_enabled():
            return _LinearFunction.apply(x, weight, bias)
        return _rows_of(_product(_padded(x), weight, bias), x)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Plain fp32 tensors on CPUs, and enough of them."""
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)  # not parts of a tensor on several ranks
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= _MIN_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


def rounded(n_rows: int) -> int:
    """The next of eight sizes to an octave, 16 at least.

    oneDNN keeps code for every size that it has seen, a megabyte and more each.
    """
    step = max(16, 1 << max(0, (n_rows - 1).bit_length() - 4))
    return -(-n_rows // step) * step


def _padded(x: Tensor) -> Tensor:
    """The rows of `x`, and zeros up to a size that oneDNN is likely to have seen."""
    x = x.flatten(0, -2)
    n_rows = rounded(len(x))
    return x if n_rows == len(x) else F.pad(x, (0, 0, 0, n_rows - len(x)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; the operator that torch's compiler puts in place of linear layers."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _rows_of(y: Tensor, like: Tensor) -> Tensor:
    """What is not padding, in the shape of `like` but for the last dimension."""
    return y[: like.shape[:-1].numel()].unflatten(0, like.shape[:-1])


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        padded = _padded(x)
        ctx.save_for_backward(padded, weight)
        return _rows_of(_product(padded, weight, bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        padded, weight = ctx.saved_tensors
        gradient = _padded(upstream)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _rows_of(_product(gradient, weight.T), upstream) if needs_x else None,
            _product(gradient.T, padded.T) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )


# Bodies of `without_switching` that run. Of the process, as torch's switch is.
_fixed: list[None] = []


@contextmanager
def without_switching() -> Iterator[None]:
    """While the body runs, `fast_fp32` changes nothing.

    For a process in which one thread generates while another trains: the switch would change the
    last bits of what the other one computes, by who comes first.
    """
    _fixed.append(None)
    try:
        yield
    finally:
        _fixed.pop()


@contextmanager
def fast_fp32(device: torch.device, n_multiplications: int = _MANY) -> Iterator[None]:
    """On CPU, all fp32 products through oneDNN where that keeps all of fp32 and there are enough
    multiplications to win back the code that it makes, and keeps, for every new size.

    torch's switch to oneDNN also allows it to round operands to bf16, which it only does on CPUs
    with AMX; there nothing is switched.
    """
    few = n_multiplications < _MANY
    if device.type != "cpu" or few or _fixed or not _onednn_keeps_fp32():
        yield
        return
    with _onednn():
        yield


@contextmanager
def _onednn() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _onednn_keeps_fp32() -> bool:
    """Multiplies numbers that bf16 does not have by the identity."""
    if not torch.backends.mkldnn.is_available():
        return False
    numbers = 1 + torch.arange(256 * 256, dtype=torch.float32).view(256, 256) / 2**20
    with _onednn():
        return torch.equal(numbers @ torch.eye(256), numbers)
