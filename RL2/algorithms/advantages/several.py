"""Advantages of several rewards."""

from dataclasses import replace

import torch
from torch import Tensor

from RL2.algorithms.advantages.returns import normalised
from RL2.algorithms.advantages.samples import by_sample


def gdpo(
    rewards: Tensor,
    reward_parts: Tensor,
    reward_weights: Tensor,
    action_mask: Tensor,
    sample_ids: Tensor,
    group_ids: Tensor,
) -> Tensor:
    """GDPO (Liu et al. 2026, "Group reward-Decoupled Normalization Policy Optimization"): each of K
    rewards is normalised within the group by itself, their weighted sum over the batch,

        A_i = sum over k of w_k (r_ik - mean_k) / std_k,  then (A - mean(A)) / std(A)

    The rewards are those that the environment returns as `rewards`, `rollout.rewards` has their
    weights; the single reward is not read. A sample counts once, whatever its length. Standard
    deviations are unbiased and have no epsilon; a reward that is equal over a group adds exactly 0.

    reward_parts, reward_weights: `[B, K]` float64, the same in all rows of a sample.
    """
    samples = by_sample(rewards, sample_ids, group_ids)
    advantages = torch.zeros_like(samples.returns)
    for part, weight in zip(reward_parts.T, reward_weights.T, strict=True):
        returns = torch.zeros_like(samples.returns).scatter_(0, samples.of_row, part.double())
        one = replace(samples, returns=returns, sizes=returns.abs())
        weights = torch.zeros_like(returns).scatter_(0, samples.of_row, weight.double())
        advantages += weights * one.relative(by_deviation=True)
    return samples.tokens(normalised(advantages), action_mask, rewards.dtype)
