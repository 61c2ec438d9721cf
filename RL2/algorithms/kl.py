"""Estimators of KL(policy || reference) from log-probabilities of tokens the policy sampled.

With d = logps - ref_logps (J. Schulman, "Approximating KL Divergence", 2020): k1 = d is unbiased
and of high variance, k2 = d^2 / 2 is biased and of low variance, k3 = exp(-d) - 1 + d is unbiased,
of low variance and never negative.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _k1(d: Tensor) -> Tensor:
    """Unbiased, of high variance."""
    return d


def _k2(d: Tensor) -> Tensor:
    """Biased, of low variance."""
    return d.square() / 2


def _k3(d: Tensor) -> Tensor:
    """Unbiased, of low variance, never negative."""
    return torch.expm1(-d) + d  # expm1: exp(-d) - 1 has no digits left for small d


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def approx_kl(
    logps: Tensor, ref_logps: Tensor, estimator: str, clamp: float | None = None
) -> Tensor:
    """Per-token estimate of the KL to the reference, in nats, in the shape of `logps`.

    Tokens at which both log-probabilities are zero (no action tokens) give zero.

    clamp: estimates above it count as it and those below 0 as 0, without gradient.
    """
    d = logps - ref_logps
    kl = KL_ESTIMATORS[estimator](d)
    if clamp is None:
        return kl
    bounded = kl.detach().clamp(0.0, clamp)
    outside = bounded != kl.detach()
    # Computed anew: the gradient of an overflow would be NaN even where it is not used.
    return torch.where(outside, bounded, KL_ESTIMATORS[estimator](d.masked_fill(outside, 0.0)))
