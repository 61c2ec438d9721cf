"""Returns of samples, minus a baseline."""

from dataclasses import replace

import torch
from torch import Tensor

from RL2.algorithms.advantages.returns import sample_returns, sum_by
from RL2.algorithms.advantages.samples import by_sample
from RL2.algorithms.rewards import SMALLEST, TOLERANCE


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
    samples = by_sample(rewards, sample_ids, group_ids)
    if global_norm or len(samples.counts) == len(samples.returns):
        group = torch.zeros_like(samples.group)
        samples = replace(samples, group=group, counts=torch.bincount(group))
    return samples.tokens(samples.relative(norm_var), action_mask, rewards.dtype)


def spo(rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, group_ids: Tensor) -> Tensor:
    """Return of the sample on each of its action tokens: no baseline, no normalisation
    ("Exploring Paths", section 3.1)."""
    return sample_returns(rewards, sample_ids).unsqueeze(-1) * action_mask


def rloo(rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, group_ids: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, "Back to Basics"; Kool et al. 2019): the return minus the mean
    return of the *other* samples of the group,

        A_i = r_i - 1/(G-1) sum over j != i of r_j = G/(G-1) (r_i - mean)

    A sample that is alone in its group, because the others failed, has no baseline and gets 0.
    """
    samples = by_sample(rewards, sample_ids, group_ids)
    counts = samples.counts[samples.group].double()
    advantages = counts / (counts - 1).clamp(min=1) * samples.relative()
    return samples.tokens(advantages, action_mask, rewards.dtype)


def opo(rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, group_ids: Tensor) -> Tensor:
    """OPO (Hao et al. 2025, "On-Policy RL with Optimal Reward Baseline"): the baseline is the mean
    return of the group, weighted by lengths,

        b = sum of l_i r_i / sum of l_i,  A_i = r_i - b

    It has the least variance if a sample's squared gradient grows as its length l_i, which is the
    number of its action tokens, those of all turns.
    """
    samples = by_sample(rewards, sample_ids, group_ids)
    lengths = sum_by(action_mask.sum(-1).double(), samples.of_row)
    weighted = sum_by(lengths * samples.returns, samples.group)
    baseline = weighted / sum_by(lengths, samples.group).clamp(min=1)
    advantages = samples.returns - baseline[samples.group]
    return samples.tokens(advantages.masked_fill(samples.equal(), 0.0), action_mask, rewards.dtype)


def remax(
    rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, greedy_reward: Tensor
) -> Tensor:
    """ReMax (Li et al. 2024): the return minus the reward of the greedy answer to the
    same prompt, A_i = r_i - r(greedy). That is `greedy_reward`, the field of the judge `greedy`
    (`rollout.judges=[greedy]`). One sample of a prompt is enough.

    The paper's per-token KL is `actor.kl.type=reward`, which counts in the whole return here; in
    the paper, from its token on.
    """
    returns = sample_returns(rewards.double(), sample_ids).unsqueeze(-1)
    advantages = returns - greedy_reward
    noise = TOLERANCE * torch.maximum(returns.abs(), greedy_reward.abs())
    equal = advantages.abs() <= noise.clamp(min=SMALLEST)  # the field is float32
    return (advantages.masked_fill(equal, 0.0) * action_mask).to(rewards.dtype)
