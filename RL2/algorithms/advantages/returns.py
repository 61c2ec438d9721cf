"""Sums of rewards."""

import torch
from torch import Tensor

from RL2.algorithms.rewards import totals


def sample_returns(rewards: Tensor, sample_ids: Tensor) -> Tensor:
    """Summed reward of the sample that each row belongs to: `[B, T]`, `[B]` -> `[B]`."""
    samples, sample_of_row = torch.unique(sample_ids, return_inverse=True)
    returns, _ = totals(rewards, sample_of_row, len(samples))
    return returns[sample_of_row].to(rewards.dtype)


def sum_by(values: Tensor, index: Tensor) -> Tensor:
    """Sums of the values with the same index: `[n]`, `[n]` -> `[largest index + 1]`."""
    n = int(index.max()) + 1 if len(index) else 0
    return values.new_zeros(n).index_add_(0, index, values)
