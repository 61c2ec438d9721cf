"""Generalised advantage estimation: the critic's values as the baseline."""

import torch
from torch import Tensor

from RL2.algorithms.advantages.returns import discounted, in_time, normalised


def gae(
    rewards: Tensor,
    values: Tensor,
    action_mask: Tensor,
    sample_ids: Tensor,
    *,
    gamma: float = 1.0,
    lamda: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Schulman et al. 2016: A_t = sum over k of (gamma lamda)^k d_{t+k}, with
    d_t = r_t + gamma V_{t+1} - V_t, and V = 0 after the last token.

    Time runs over the action tokens of a sample, from row to row if it has several: the tokens of
    an environment between two turns are no time steps. The returns, which the critic learns, are
    A + V. The advantages are then normalised to mean 0 and an unbiased standard deviation of 1 over
    all action tokens of the batch; all equal, up to rounding, they are 0.
    """
    place = in_time(action_mask, sample_ids)
    rewards_, values_ = place.table(rewards), place.table(values)
    after = torch.nn.functional.pad(values_[:, 1:], (0, 1))
    found = discounted(rewards_ + gamma * after - values_, gamma * lamda)
    advantages, returns = place.tokens(found), place.tokens(found + values_)
    sizes = returns.abs() + values.abs()
    return normalised(advantages, action_mask, sizes), {"returns": returns}
