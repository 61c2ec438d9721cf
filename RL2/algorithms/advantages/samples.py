"""The samples of a batch and their groups, for estimators in which a sample is one number."""

from dataclasses import dataclass

import torch
from torch import Tensor

from RL2.algorithms.advantages.returns import sum_by
from RL2.algorithms.rewards import all_equal, totals


@dataclass(frozen=True, eq=False)
class Samples:
    """S samples in G groups, however many rows each of them has.

    Attributes:
        returns: `[S]` float64, the summed rewards. sizes: `[S]`, the sums of their magnitudes.
        of_row: `[B]`, the sample of each row. group: `[S]`, the group of each sample.
        counts: `[G]`, samples of each group.
    """

    returns: Tensor
    sizes: Tensor
    of_row: Tensor
    group: Tensor
    counts: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the group of each sample: `[S]` -> `[S]`."""
        return (sum_by(values, self.group) / self.counts)[self.group]

    def deviation(self, values: Tensor) -> Tensor:
        """The unbiased standard deviation over the group of each sample: `[S]` -> `[S]`; 0 if it is
        alone."""
        squares = sum_by((values - self.mean(values)).square(), self.group)
        return (squares / (self.counts - 1).clamp(min=1)).sqrt()[self.group]

    def relative(self, by_deviation: bool = False) -> Tensor:
        """The returns minus the mean of the group, on request over its deviation; `[S]`, exactly 0
        where all returns of the group are equal."""
        found = self.returns - self.mean(self.returns)
        if by_deviation:
            found = found / self.deviation(self.returns)
        return found.masked_fill(self.equal(), 0.0)

    def equal(self) -> Tensor:
        """Whether all returns of a sample's group are equal, up to rounding: bool `[S]`."""
        return all_equal(self.returns, self.group, len(self.counts), self.sizes)[self.group]

    def tokens(self, values: Tensor, action_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Each sample's value on its action tokens: `[S]` -> `[B, T]`."""
        return (values[self.of_row].unsqueeze(-1) * action_mask).to(dtype)


def by_sample(rewards: Tensor, sample_ids: Tensor, group_ids: Tensor) -> Samples:
    """The samples of a batch: `[B, T]`, `[B]`, `[B]`."""
    samples, of_row = torch.unique(sample_ids, return_inverse=True)
    # fp64: equal rewards must give a mean that is equal to them.
    returns, sizes = totals(rewards, of_row, len(samples))
    group = group_ids.new_zeros(len(samples)).scatter_(0, of_row, group_ids)
    group = torch.unique(group, return_inverse=True)[1]
    return Samples(returns, sizes, of_row, group, torch.bincount(group))
