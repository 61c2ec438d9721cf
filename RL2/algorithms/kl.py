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


def approx_kl(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of the KL to the reference, in nats, in the shape of `logps`.

    Tokens at which both log-probabilities are zero (no action tokens) give zero.
    """
    return KL_ESTIMATORS[estimator](logps - ref_logps)
