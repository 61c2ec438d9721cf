"""Policy gradients with the ratio of a whole sequence, or with a ratio that keeps its gradient."""

import math

import torch
from torch import Tensor

from RL2.algorithms.segments import Segments

# A ratio counts as e^80 at most, and has no gradient beyond: products of it stay finite in float32.
_LARGEST = 80.0


def ratio_of(difference: Tensor) -> Tensor:
    """The ratio of two probabilities whose logarithms differ by that."""
    return difference.clamp(max=_LARGEST).exp()


def clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(A r, A clip(r, 1 - clip_low, 1 + clip_high)), and whether the clipped one is smaller.

    Raises:
        ValueError: a negative clip.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: must not be negative")
    objective = advantages * ratio
    bounded = advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(objective, bounded), bounded < objective


def gspo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    sequences: Segments,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective of a sequence's ratio, one loss a sequence (Zheng et al. 2025, "Group
    Sequence Policy Optimization", arXiv:2507.18071, eq. 5).

    s = exp(mean over its tokens of (logps - old_logps)), A the mean of its tokens' advantages:
    -min(A s, A clip(s, 1 - clip_low, 1 + clip_high)). Unlike `ppo`, all tokens of a sequence are
    clipped together. Default clips are the paper's.
    """
    s = ratio_of(sequences.mean(logps - old_logps))
    losses, is_clipped = clipped(s, sequences.mean(advantages), clip_low, clip_high)
    return losses, {"clip_ratio": is_clipped.to(losses)}


def gspo_token(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    sequences: Segments,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO with an advantage of its own for each token (Zheng et al. 2025, arXiv:2507.18071): the
    ratio s of its sequence in value, the gradient of its own log-probability.

    s_t = sg(s) p_t / sg(p_t). With equal advantages in a sequence the gradient is that of `gspo`.
    """
    mean = sequences.mean((logps - old_logps).detach())
    s = sequences.spread(ratio_of(mean))
    losses, is_clipped = clipped(s * with_gradient_of(logps), advantages, clip_low, clip_high)
    return losses, {"clip_ratio": is_clipped.to(losses)}


def gmpo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    sequences: Segments,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Geometric mean of a sequence's clipped token ratios, one loss a sequence (Zhao et al. 2025,
    "Geometric-Mean Policy Optimization", arXiv:2507.20673).

    -A exp(mean over its tokens of c(logps - old_logps)), c(d) = min(d, clip_high) where the
    sequence's mean advantage A >= 0, else max(d, -clip_low). So the clips bound *logarithms*: the
    paper's (e^-0.4, e^0.4) is 0.4. As in `ppo`, a token is clipped only where that makes the
    objective smaller, and then alone.

    Raises:
        ValueError: a negative clip.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: must not be negative")
    a = sequences.mean(advantages)
    d = logps - old_logps
    bounded = torch.where(sequences.spread(a) < 0, d.clamp(min=-clip_low), d.clamp(max=clip_high))
    ratio = ratio_of(sequences.mean(bounded))
    return -a * ratio, {"clip_ratio": sequences.mean((bounded != d).to(d).detach())}


def cispo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_high: float = 4.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with a bounded weight: -sg(min(r, 1 + clip_high)) A logps, r = exp(logps -
    old_logps) (MiniMax 2025, "MiniMax-M1", arXiv:2506.13585).

    Unlike `ppo`, the bound takes no token's gradient. There is no bound below, as in the paper's
    runs; the paper does not tell its upper one. The default, 5 in all, is that of Khatri et al.
    2025, "The Art of Scaling Reinforcement Learning Compute for LLMs", arXiv:2510.13786.

    Raises:
        ValueError: a negative clip.
    """
    if clip_high < 0:
        raise ValueError(f"clip_high={clip_high}: must not be negative")
    ratio = ratio_of(logps - old_logps).detach()
    weights = ratio.clamp(max=1 + clip_high)
    # a product with a weight of 0 counts as 0, also at logps = -inf
    losses = -weights * advantages * logps.masked_fill(weights == 0, 0.0)
    return losses, {"clip_ratio": (ratio > 1 + clip_high).to(losses)}


def with_gradient_of(logps: Tensor) -> Tensor:
    """1, with the gradient of `logps`."""
    return 1 + (logps - logps.detach()).masked_fill(logps.detach() == -math.inf, 0.0)
