"""Policy gradients and likelihood."""

from torch import Tensor

from RL2.algorithms.losses.ratios import clipped, ratio_of


def ppo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient (Schulman et al. 2017): -min(A r, A clip(r, 1 - clip_low,
    1 + clip_high)) with r = exp(logps - old_logps).

    With `dual_clip` = c the loss of a token with A < 0 is at most -c A (Ye et al. 2020, "Mastering
    Complex Control in MOBA Games", arXiv:1912.09729), without gradient there.

    The metric `clip_ratio` is 1 at tokens where a clipped objective counts.

    Raises:
        ValueError: a negative clip, or a `dual_clip` of 1 or less.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip}: must be above 1")
    losses, is_clipped = clipped(ratio_of(logps - old_logps), advantages, clip_low, clip_high)
    if dual_clip is not None:
        beyond = (advantages < 0) & (losses > -dual_clip * advantages)
        losses = losses.where(~beyond, -dual_clip * advantages)
        is_clipped = is_clipped | beyond
    return losses, {"clip_ratio": is_clipped.to(losses)}


def nll(logps: Tensor) -> Tensor:
    """Negative log-likelihood: REINFORCE when multiplied by an advantage, SFT when not."""
    return -logps
