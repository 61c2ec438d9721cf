"""The public entries, and the choice of the implementation."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from RL2.ops.token_stats.in_forward import tiled_token_loss
from RL2.ops.token_stats.kernels import COMPILED, EAGER, Kernels
from RL2.ops.token_stats.naive import naive_token_stats
from RL2.ops.token_stats.recompute import tiled_token_stats
from RL2.ops.token_stats.stats import LossFunction, TokenStats, VocabularyShard, loss_of

# Vocabulary size from which on compiling, which takes half a minute, is worth it on CPU.
_COMPILED_FROM = 2**15


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    bias: Tensor | None = None,
    *,
    top_k: int = 0,
    implementation: str = "auto",
    shard: VocabularyShard | None = None,
    at: Tensor | None = None,
) -> TokenStats:
    """Statistics of `softmax((hidden @ weight.T + bias) / temperature)` at `actions`.

    Any differentiable function of them trains `hidden`, `weight` and `bias`. In its backward pass
    the logits are recomputed tile by tile (except by `naive`), for tokens whose statistics receive
    a gradient that is not exactly zero.

    Args:
        hidden: `[T, H]`, T may be 0.
        weight: `[V, H]`, the head (tied or not), V >= 1.
        actions: `[T]` integers in [0, V): the tokens that were written.
        temperature: > 0.
        wanted: names from `STATISTICS`; nothing else is computed.
        bias: `[V]` or None. -inf marks columns that are not tokens (padded vocabulary).
        top_k: K of `top_logps [T, K]`.
        implementation: a key of `IMPLEMENTATIONS`, or `auto` for the fastest on this device.
        shard: the columns of `weight` and `bias`, if the vocabulary is split over a
            tensor-parallel group. Every rank gets the statistics, and the gradient of `hidden`,
            of the whole vocabulary.
        at: `[T, K]` integers in [0, V) or -1: the tokens of `at_logps [T, K]`, the same on every
            rank.

    Half-precision inputs give fp32 logits, as rounding them to bf16 would cause errors of 0.1 in
    log(1 - p). Autocast has no effect here for the same reason.

    Raises:
        ValueError: wrong shapes, an unknown name in `wanted` or `implementation`, a temperature
            that is not positive, `top_logps` with `top_k` below 1, `at_logps` without `at`, `naive`
            with a shard.
        ImportError: `triton` if triton is not installed.
    """
    kernels = _kernels(implementation, weight, shard)
    if kernels is None:
        return naive_token_stats(
            hidden, weight, actions, temperature, wanted, bias, top_k=top_k, at=at
        )
    return tiled_token_stats(
        hidden, weight, actions, temperature, wanted, bias,
        top_k=top_k, kernels=kernels, shard=shard, at=at,
    )  # fmt: skip


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    loss_fn: LossFunction,
    bias: Tensor | None = None,
    *,
    top_k: int = 0,
    implementation: str = "auto",
    shard: VocabularyShard | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A sum over tokens of a function of their statistics, and the sums of its metrics.

    The gradients are formed in the forward pass, while a chunk's logits exist: three matrix
    products instead of the four of `linear_token_stats`. The other arguments are the same.

    Args:
        loss_fn: `(TokenStats, rows) -> (loss, {name: metric})`, called once per chunk of
            consecutive tokens; `rows` is their slice of the T tokens. Loss and metrics are scalars
            that are summed over the chunks, so any divisor must be known beforehand (for example as
            a weight per token). Gradients go only to `hidden`, `weight` and `bias`, and to nothing
            else that `loss_fn` reads.

    Returns:
        The loss, whose `backward` may be called once, and the metrics, without gradients.
    """
    kernels = _kernels(implementation, weight, shard)
    if kernels is None:
        stats = naive_token_stats(
            hidden, weight, actions, temperature, wanted, bias, top_k=top_k, at=at
        )
        return loss_of(stats, len(hidden), loss_fn)
    return tiled_token_loss(
        hidden, weight, actions, temperature, wanted, loss_fn, bias,
        top_k=top_k, kernels=kernels, shard=shard, at=at,
    )  # fmt: skip


def _naive() -> None:
    """Full logits."""


def _tiled() -> Kernels:
    """Vocabulary tiles."""
    return EAGER


def _compiled() -> Kernels:
    """Vocabulary tiles, with the element-wise part compiled by torch.compile."""
    return COMPILED


def _triton() -> Kernels:
    """The same with Triton, on CUDA."""
    return replace(_triton_fused(), fused_state=None)


def _triton_fused() -> Kernels:
    """As triton, but without tiles if no gradients are needed."""
    from RL2.ops.token_stats.triton_fused import fused_state
    from RL2.ops.token_stats.triton_kernels import logit_gradients, update_state

    return Kernels(update_state, logit_gradients, fused_state)


# None: full logits and autograd. `--help` shows the docstrings.
IMPLEMENTATIONS: dict[str, Callable[[], Kernels | None]] = {
    "naive": _naive,
    "tiled": _tiled,
    "compiled": _compiled,
    "triton": _triton,
    "triton_fused": _triton_fused,
}


def _fastest(weight: Tensor) -> str:
    """The choice depends only on device and vocabulary, so a model always uses the same code."""
    if weight.is_cuda:  # `triton` has not been measured on a GPU yet
        return "compiled" if importlib.util.find_spec("triton") else "tiled"
    return "compiled" if len(weight) >= _COMPILED_FROM and has_compiler() else "tiled"


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def _kernels(implementation: str, weight: Tensor, shard: VocabularyShard | None) -> Kernels | None:
    name = _fastest(weight) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}: unknown; use auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if name == "naive" and shard is not None:
        raise ValueError("implementation='naive': takes no shard; use 'auto' or 'tiled'")
    return IMPLEMENTATIONS[name]()
