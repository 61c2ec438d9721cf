"""Fast fp32 matrix products on CPUs.

torch multiplies fp32 matrices with MKL, which reaches less than half of oneDNN's speed on AMD's
CPUs (`benchmarks/RESULTS.md`). torch's switch to oneDNN affects every product of the process: it
slows the many tiny ones inside attention, and changes the last bits of an engine that generates in
another thread. So the switch is not used: the backbone's linear layers and the head call oneDNN's
operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Products of fewer rows take longer to set up than to compute.
_MIN_ROWS = 16
# Multiplications that take a millisecond, and a number at which MKL is as fast.
_MANY, _FEW = 2**26, 2**12
# Terms that oneDNN adds at a time when it multiplies a transposed matrix.
_TERMS = 512


def accelerate_linears(model: nn.Module) -> None:
    """Let the linear layers of a model multiply with oneDNN if they are in fp32 on a CPU.

    Each is replaced by a layer with the same parameters and hooks under the same name. Not for
    layers that will be compiled, as torch's compiler chooses the products itself.
    """
    if not torch.backends.mkldnn.is_available():
        return
    replaced: dict[nn.Module, _Linear] = {}  # one layer may occur in several places
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) is nn.Linear:
                parent._modules[name] = replaced.setdefault(child, _Linear.like(child))


class _Linear(nn.Linear):
    @classmethod
    def like(cls, linear: nn.Linear) -> "_Linear":
        """A layer that shares the attributes of `linear`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not _suits(x, weight):
            return F.linear(x, weight, bias)
        if torch.is_grad_enabled():
            return _LinearFunction.apply(x, weight, bias)
        return _rows_of(_product(_padded(x), weight, bias), x)


def worthwhile(device: torch.device, n_multiplications: int) -> bool:
    """Whether this many multiplications are worth the code that oneDNN generates, and keeps, for
    every new size."""
    return (
        device.type == "cpu" and n_multiplications >= _MANY and torch.backends.mkldnn.is_available()
    )


def multiplies(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether `product` can compute `out = a @ b`, and is faster at it."""
    return (
        a.dtype == b.dtype == out.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] > _FEW
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` by oneDNN, for fp32 matrices on CPUs.

    A transposed `a`, as in the gradient of a weight, would be copied. So the transposed product is
    computed, which copies `b`, and it sums as oneDNN's own products of such matrices do.
    """
    if a.stride(1) == 1:
        return _product(a, b.T)
    parts = zip(a.split(_TERMS, 1), b.split(_TERMS), strict=True)
    products = (_product(rows.T, columns) for columns, rows in parts)
    total = next(products)
    for part in products:
        total.add_(part)
    return total.T


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain fp32 tensors on CPUs, with enough rows."""
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

    oneDNN keeps code for every size that it has seen, a megabyte or more each.
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
    """The rows without padding, in the shape of `like` except for the last dimension."""
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
