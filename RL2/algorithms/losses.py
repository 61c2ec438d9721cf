"""Token losses: one pure function each.

The names of a loss's positional parameters say what it needs: token statistics
(`RL2.ops.STATISTICS`) and batch fields (`RL2.algorithms.FIELDS`), all flat float tensors `[N]`,
one entry per action token. Its keyword-only parameters are options, read from `actor.loss.*`. It
returns the losses `[N]`, or `(losses, {metric: [N]})`. How tokens are averaged, the advantage that
multiplies a loss which does not take `advantages` itself, importance weights and the entropy bonus
are applied outside.

    def my_loss(logps, log1mps, advantages, *, margin=0.1):
        return -advantages * (logps - log1mps).clamp(max=margin)

lies in a file of its own and trains with `actor.loss.import_path=my_loss.py:my_loss`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from RL2.ops.token_stats import NEG_INF


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


def max_target_kl(
    logps: Tensor,
    log1mps: Tensor,
    max_logps: Tensor,
    max_log1mps: Tensor,
    *,
    detach_target: bool = False,
) -> Tensor:
    """KL from Bernoulli(p_m) to Bernoulli(p_a), m the most likely token ("Exploring Paths",
    sections 3.1 and 3.2): exactly 0 with exactly zero gradient where p_a = p_m.

    The gradient also flows through p_m, as in the reference implementation, unless
    `detach_target`.
    """
    if detach_target:
        max_logps, max_log1mps = max_logps.detach(), max_log1mps.detach()
    differs = logps != max_logps
    return _weighted_log_ratio(max_logps, logps, differs) + _weighted_log_ratio(
        max_log1mps, log1mps, differs
    )


def fixed_target_kl(
    logps: Tensor, log1mps: Tensor, *, target: float = 0.5, gate: bool = True
) -> Tensor:
    """KL from Bernoulli(target) to Bernoulli(p_a) ("Exploring Paths", section 3.3), with `gate`
    only at tokens with p_a > target; 0 with zero gradient at the others.

    0 with zero gradient, too, where log(1 - p_a) = -inf: no other token was possible, so there is
    nothing to move probability to.

    Raises:
        ValueError: `target` outside of (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"target={target}: must lie strictly between 0 and 1")
    counts = log1mps != NEG_INF
    if gate:
        counts = counts & ~(logps <= math.log(target))  # a NaN stays visible
    logps, log1mps = logps.masked_fill(~counts, 0.0), log1mps.masked_fill(~counts, 0.0)
    negative_entropy = target * math.log(target) + (1 - target) * math.log1p(-target)
    losses = negative_entropy - target * logps - (1 - target) * log1mps
    return losses.masked_fill(~counts, 0.0)


def nll(logps: Tensor) -> Tensor:
    """Negative log-likelihood: REINFORCE when multiplied by an advantage, SFT when not."""
    return -logps


LOSSES: dict[str, Callable[..., Any]] = {
    "ppo": ppo,
    "max_target_kl": max_target_kl,
    "fixed_target_kl": fixed_target_kl,
    "nll": nll,
}


def _weighted_log_ratio(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """exp(x) (x - y); 0 with zero gradient where not `counts` or exp(x) = 0, also at x = -inf."""
    counts = counts & (x.detach().exp() != 0)
    x, y = x.masked_fill(~counts, 0.0), y.masked_fill(~counts, 0.0)
    return (x.exp() * (x - y)).masked_fill(~counts, 0.0)
