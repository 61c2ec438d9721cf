"""REINFORCE++: advantages that are normalised over the batch (Hu et al. 2025)."""

from torch import Tensor

from RL2.algorithms.advantages.returns import normalised, rewards_to_go
from RL2.algorithms.advantages.samples import by_sample


def reinforce_pp(
    rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262, equations for k = 1):

        R_t = sum over i >= t of gamma^(i-t) (r_i - beta k1_i),  A = (R - mean(R)) / std(R)

    The KL to the reference, k1 = log(p / p_ref), is `actor.kl.type=reward` with `coef` beta. Time
    runs over the action tokens of a sample, from row to row; mean and unbiased standard deviation
    are those of all action tokens of the rollout's batch. There is no epsilon: equal returns give
    exactly 0. A group has no baseline of its own, so one sample of a prompt is enough.
    """
    returns = rewards_to_go(rewards, action_mask, sample_ids, gamma)
    return normalised(returns, action_mask).to(rewards.dtype)


def reinforce_pp_baseline(
    rewards: Tensor, action_mask: Tensor, sample_ids: Tensor, group_ids: Tensor
) -> Tensor:
    """REINFORCE++ with baseline (Hu et al. 2025, for several samples of a prompt): the return minus
    the mean of the group, divided by the unbiased standard deviation of that over all samples of
    the batch,

        A'_i = r_i - mean over the group,  A_i = A'_i / std(A')

    The mean of A' over the batch, which the paper subtracts, is 0. A sample counts once; in the
    paper's code as often as it has tokens. Its KL is in the loss: `actor.kl.type=loss`, k2.
    """
    samples = by_sample(rewards, sample_ids, group_ids)
    return samples.tokens(normalised(samples.relative()), action_mask, rewards.dtype)
