"""Tokens for policy gradients: log-probabilities of two policies that are near each other."""

import torch
from torch import Tensor

from RL2.algorithms.segments import Segments

OF_TOKEN = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])


def sequences(of_token: Tensor = OF_TOKEN) -> Segments:
    return Segments(of_token, int(of_token.max()) + 1)


def near_policies(seed: int = 0, size: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """logps, old_logps, and advantages of which each sequence has one, of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    n = len(OF_TOKEN)
    old_logps = -normal(n).abs() - 1.5
    advantages = torch.tensor([1.5, -0.5, 0.7, -1.2], dtype=torch.float64)[OF_TOKEN]
    return old_logps + size * normal(n), old_logps, advantages


def extremes() -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of log-probabilities from certain to impossible, with every sign: one token a
    sequence."""
    values = torch.tensor([0.0, -1e-7, -1.0, -90.0, -1e4])
    grid = torch.cartesian_prod(values, values, torch.tensor([-2.0, 0.0, 3.0]))
    return grid[:, 0].clone(), grid[:, 1].clone(), grid[:, 2].clone()


def gradient(loss, logps: Tensor) -> Tensor:
    """Of the summed losses for `logps`."""
    leaf = logps.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf)[0].sum(), leaf)
    return found
