"""When rewards count as equal, or as zero: one rule for filtering, advantages and divisors.

Rewards are sums over turns, and 0.1 + 0.2 is not 0.3 in binary. Where advantages are normalised,
and in an optimizer that normalises, such a rounding error would count like a real difference. The
rule keeps every difference that float32 can tell apart.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

TOLERANCE = 2.0**-22  # relative: two float32 numbers next to each other, with their rounding
SMALLEST = 2.0**-149  # above 0 in float32; the square of what is smaller may be 0 in float64


def total(rewards: Iterable[float]) -> float:
    """The sum; exactly 0 if it is no more than the rounding of its terms."""
    rewards = list(rewards)
    sum_ = math.fsum(rewards)
    noise = max(TOLERANCE * math.fsum(map(abs, rewards)), SMALLEST)
    return sum_ if abs(sum_) > noise else 0.0


def totals(rewards: Tensor, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`total` of the rows `[B, T]` of each of `n` samples, and the sums of magnitudes, both `[n]`
    float64. index: `[B]`, which sample a row belongs to."""
    rewards = rewards.double()
    sums, sizes = (
        rewards.new_zeros(n).index_add_(0, index, of_rows)
        for of_rows in (rewards.sum(-1), rewards.abs().sum(-1))
    )
    return sums.masked_fill(sums.abs() <= (TOLERANCE * sizes).clamp(min=SMALLEST), 0.0), sizes


def all_equal(returns: Tensor, group: Tensor, n: int, sizes: Tensor | None = None) -> Tensor:
    """Which of `n` groups hold equal returns only: bool `[n]`.

    Args:
        returns: `[S]` float64. group: `[S]`, which group each belongs to.
        sizes: `[S]`, the magnitude of what a return was summed from; by default its own.
    """
    sizes = returns.abs() if sizes is None else sizes

    def extreme(values: Tensor, how: str) -> Tensor:
        return values.new_zeros(n).scatter_reduce_(0, group, values, how, include_self=False)

    spread = extreme(returns, "amax") - extreme(returns, "amin")
    return spread <= (TOLERANCE * extreme(sizes, "amax")).clamp(min=SMALLEST)


def are_equal(returns: Iterable[float]) -> bool:
    """`all_equal` of one group, without tensors; true of none."""
    returns = list(returns) or [0.0]
    return max(returns) - min(returns) <= max(TOLERANCE * max(map(abs, returns)), SMALLEST)


def in_float32(values: Tensor) -> Tensor:
    """`values` in float32; a finite one beyond it becomes the largest. (Two rewards in float32 may
    be further apart than it reaches.)"""
    largest = torch.finfo(torch.float32).max
    return values.where(~values.isfinite(), values.clamp(-largest, largest)).float()
