"""Advantages for being right in any of several attempts."""

import math

import torch
from torch import Tensor

from RL2.algorithms.advantages.samples import by_sample


def maxrl(rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, group_ids: Tensor) -> Tensor:
    """MaxRL (Tajwar et al. 2026, "Maximum Likelihood Reinforcement Learning"): the return minus the
    group's mean, divided by that mean,

        A_i = (r_i - mean) / mean, 0 where the mean is 0

    With rewards of 0 and 1 its expectation is the gradient of a truncated sum of pass@k / k over
    k <= G: rare successes weigh more, as they do in maximum likelihood.

    Raises:
        ValueError: a group's mean is below 0, which would turn the gradient around.
    """
    samples = by_sample(rewards, sample_ids, group_ids)
    mean = samples.mean(samples.returns)
    if (mean < 0).any():
        raise ValueError(
            f"the mean reward of a group is {mean.min().item():.4g}, and maxrl divides by it; use "
            "rewards of 0 or more, and no actor.kl.type=reward"
        )
    flat = samples.equal() | (mean == 0)
    advantages = ((samples.returns - mean) / mean).masked_fill(flat, 0.0)
    return samples.tokens(advantages, action_mask, rewards.dtype)


def pass_k(
    rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, group_ids: Tensor, *, k: int = 4
) -> Tensor:
    """The unbiased gradient of pass@k, or of the best reward of k samples (Walder and Karkhanis
    2025, "Pass@K Policy Optimization", max@k with the leave-one-out-minus-one baseline):

        A_i = k · mean over the sets T of k-1 other samples of max(r_i, max T) - max T

    This is n times their transformed reward s_i: their gradient is a sum over the n samples of a
    prompt, a loss here is a mean. Rewards need not be 0 or 1; where they are, a wrong sample gets 0
    and a right one k times the share of sets without another right one. k = 1 has no such baseline:
    that is `rloo`. In a group that lost so many samples that k-1 others are not there, it is 0.
    """
    samples = by_sample(rewards, sample_ids, group_ids)
    advantages = torch.zeros_like(samples.returns)
    for group in range(len(samples.counts)):
        own = (samples.group == group).nonzero()[:, 0]
        if len(own) >= k:
            advantages[own] = _best_of(samples.returns[own], k)
    return samples.tokens(advantages.masked_fill(samples.equal(), 0.0), action_mask, rewards.dtype)


def _best_of(returns: Tensor, k: int) -> Tensor:
    """`pass_k` of one group, `[n]` -> `[n]`, without its n over k sets."""
    n = len(returns)
    ordered, order = returns.sort()
    # The best of k-1 of the n-1 others, by its place among them in ascending order.
    ways = [math.comb(place, k - 2) / math.comb(n - 1, k - 1) for place in range(n - 1)]
    others = torch.stack([torch.cat([ordered[:i], ordered[i + 1 :]]) for i in range(n)])
    gains = (ordered[:, None] - others).clamp(min=0) @ ordered.new_tensor(ways)
    return torch.empty_like(returns).index_copy_(0, order, k * gains)
