"""Policy gradients and likelihood."""

import torch
from torch import Tensor


def ppo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient (Schulman et al. 2017): -min(A r, A clip(r, 1 - clip_low,
    1 + clip_high)) with r = exp(logps - old_logps).

    The metric `clip_ratio` is 1 at tokens where the clipped objective is the smaller one.

    Raises:
        ValueError: a negative clip.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: must not be negative")
    ratio = (logps - old_logps).exp()
    objective = advantages * ratio
    clipped = advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(objective, clipped), {"clip_ratio": (clipped < objective).to(ratio)}


def nll(logps: Tensor) -> Tensor:
    """Negative log-likelihood: REINFORCE when multiplied by an advantage, SFT when not."""
    return -logps
