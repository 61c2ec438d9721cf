"""Returns of samples, minus a baseline."""

import torch
from torch import Tensor

from RL2.algorithms.advantages.returns import sample_returns, sum_by
from RL2.algorithms.rewards import all_equal, totals


def reinforce(
    rewards: Tensor,
    action_mask: Tensor,
    sample_ids: Tensor,
    group_ids: Tensor,
    *,
    global_norm: bool = False,
    norm_var: bool = False,
) -> Tensor:
    """Return of the sample minus a baseline, on every action token of the sample.

    The baseline is the mean return over the *samples* of the group, however many rows each of
    them has; it is the mean over all samples of the batch if `global_norm`, or if no group has
    two samples. `norm_var` divides by the unbiased standard deviation over the same samples. Where
    all of them have the same return, up to rounding, or there is only one, the advantage is exactly
    0. `norm_var=False` is Dr. GRPO (Liu et al. 2025), `True` GRPO (Shao et al. 2024).
    """
    samples, sample_of_row = torch.unique(sample_ids, return_inverse=True)
    # fp64: equal rewards must give a mean that is equal to them.
    returns, sizes = totals(rewards, sample_of_row, len(samples))
    group_of_sample = group_ids.new_zeros(len(samples)).scatter_(0, sample_of_row, group_ids)
    groups, group_of_sample = torch.unique(group_of_sample, return_inverse=True)
    if global_norm or len(groups) == len(samples):
        group_of_sample = torch.zeros_like(group_of_sample)

    counts = torch.bincount(group_of_sample)
    mean = sum_by(returns, group_of_sample) / counts
    advantages = returns - mean[group_of_sample]
    equal = all_equal(returns, group_of_sample, len(counts), sizes)
    if norm_var:
        variance = sum_by(advantages.square(), group_of_sample) / (counts - 1).clamp(min=1)
        advantages = advantages / variance.sqrt()[group_of_sample]
    advantages = advantages.masked_fill(equal[group_of_sample], 0.0)
    return (advantages[sample_of_row].unsqueeze(-1) * action_mask).to(rewards.dtype)


def spo(rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, group_ids: Tensor) -> Tensor:
    """Return of the sample on each of its action tokens: no baseline, no normalisation
    ("Exploring Paths", section 3.1)."""
    return sample_returns(rewards, sample_ids).unsqueeze(-1) * action_mask
