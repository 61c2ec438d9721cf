"""Advantages of a student that learns from a teacher."""

import torch
from torch import Tensor

from RL2.algorithms.advantages.baselines import reinforce


def reverse_kl(
    teacher_logps: Tensor, old_logps: Tensor, action_mask: Tensor, *, teacher_coef: float = 1.0
) -> Tensor:
    """The teacher's log-probability of each token minus the student's (on-policy distillation),
    without any reward.

    Lu et al. 2025 (Thinking Machines). The mean over the student's samples is minus the KL from
    student to teacher. Each token answers for itself alone (a discount of 0).
    """
    return teacher_coef * (teacher_logps - old_logps) * action_mask


def reinforce_reverse_kl(
    rewards: Tensor,
    teacher_logps: Tensor,
    old_logps: Tensor,
    action_mask: Tensor,
    sample_ids: Tensor,
    group_ids: Tensor,
    *,
    teacher_coef: float = 1.0,
    global_norm: bool = False,
    norm_var: bool = False,
) -> Tensor:
    """`reinforce` plus `reverse_kl`: the reward of the sample, and the teacher for each token."""
    of_reward = reinforce(
        rewards, action_mask, sample_ids, group_ids, global_norm=global_norm, norm_var=norm_var
    )
    of_teacher = reverse_kl(teacher_logps, old_logps, action_mask, teacher_coef=teacher_coef)
    return of_reward + of_teacher.to(of_reward.dtype)


def ones(action_mask: Tensor) -> Tensor:
    """1 on every action token, for a loss that needs no advantage (a distance to a teacher)."""
    return action_mask.to(torch.float32)
