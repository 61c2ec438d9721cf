"""Sums of rewards."""

from dataclasses import dataclass

import torch
from torch import Tensor

from RL2.algorithms.rewards import all_equal, totals


def sample_returns(rewards: Tensor, sample_ids: Tensor) -> Tensor:
    """Summed reward of the sample that each row belongs to: `[B, T]`, `[B]` -> `[B]`."""
    samples, sample_of_row = torch.unique(sample_ids, return_inverse=True)
    returns, _ = totals(rewards, sample_of_row, len(samples))
    return returns[sample_of_row].to(rewards.dtype)


def sum_by(values: Tensor, index: Tensor) -> Tensor:
    """Sums of the values with the same index: `[n]`, `[n]` -> `[largest index + 1]`."""
    n = int(index.max()) + 1 if len(index) else 0
    return values.new_zeros(n).index_add_(0, index, values)


@dataclass(frozen=True, eq=False)
class Time:
    """Where the N action tokens of a batch are: `[S, L]` by sample and time, L those of the longest
    sample.

    Attributes:
        mask: `[B, T]`, which tokens they are.
        sample, step: `[N]`, their places in the table.
    """

    mask: Tensor
    sample: Tensor
    step: Tensor

    def table(self, x: Tensor) -> Tensor:
        """`[B, T]` -> `[S, L]` in float64; 0 after the last token of a sample."""
        n, length = (int(one.max()) + 1 if len(one) else 0 for one in (self.sample, self.step))
        table = torch.zeros(n, length, dtype=torch.float64, device=x.device)
        table[self.sample, self.step] = x[self.mask].double()
        return table

    def tokens(self, table: Tensor) -> Tensor:
        """`[S, L]` -> `[B, T]`; 0 at tokens that are no actions."""
        x = table.new_zeros(self.mask.shape)
        x[self.mask] = table[self.sample, self.step]
        return x


def in_time(action_mask: Tensor, sample_ids: Tensor) -> Time:
    """The action tokens of each sample one after the other; its rows continue each other."""
    row = action_mask.nonzero()[:, 0]
    sample = sample_ids[row].unique(return_inverse=True)[1]
    order = sample.argsort(stable=True)
    counts = torch.bincount(sample)
    first = counts.cumsum(0) - counts
    step = torch.empty_like(sample)
    step[order] = torch.arange(len(sample), device=sample.device) - first[sample[order]]
    return Time(action_mask, sample, step)


def discounted(x: Tensor, factor: float) -> Tensor:
    """sum over k of factor^k x_{t+k}: `[S, L]` -> `[S, L]`."""
    result, later = torch.empty_like(x), x.new_zeros(len(x))
    for t in reversed(range(x.shape[1])):
        later = result[:, t] = x[:, t] + factor * later
    return result


def rewards_to_go(rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, gamma: float) -> Tensor:
    """The discounted rewards from each action token on: `[B, T]`."""
    place = in_time(action_mask, sample_ids)
    return place.tokens(discounted(place.table(rewards), gamma))


def normalised(x: Tensor, mask: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
    """Mean 0 and an unbiased standard deviation of 1 over the values where the mask is True, in
    float64; 0 elsewhere, and where all of them are equal, up to rounding.

    sizes: the magnitudes of what they were summed from; by default their own.
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    own, result = x[mask].double(), torch.zeros_like(x, dtype=torch.float64)
    one = torch.zeros_like(own, dtype=torch.int64)
    if len(own) and not all_equal(own, one, 1, None if sizes is None else sizes[mask]):
        result[mask] = (own - own.mean()) / own.std()
    return result
