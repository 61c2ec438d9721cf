"""Policy gradients that treat a few tokens of a batch in another way than the others.

Which tokens those are, depends on the whole optimizer batch. A loss that names `selected` says how
they are found, with a function as its attribute `select`. That one is called before the update, by
one process and with all tokens of the optimizer batch: its parameters are named as those of an
advantage estimator, and may be `advantages`. It returns `[B, T]` numbers, of which the loss gets
those of its tokens as `selected [N]`. So the same tokens are selected on any number of ranks.
Options of either function are options of the loss.

All statistics are those of the policy before the updates on this rollout; the papers' code takes
those of the moment, which are the same in the first optimizer step.
"""

import math

import torch
from torch import Tensor

from RL2.algorithms.losses.ratios import clipped, ratio_of


def clip_cov(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    selected: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `ppo`, 0 without gradient at a few tokens of high covariance (Clip-Cov; Cui et
    al. 2025, "The Entropy Mechanism of Reinforcement Learning", arXiv:2505.22617).

    Those are drawn from the tokens with a covariance between `min_covariance` and
    `max_covariance`; see `covariances`. The paper has no clip besides; the ratio is bounded by 0
    and 2, as in the authors' runs.
    """
    losses, is_clipped = clipped(ratio_of(logps - old_logps), advantages, clip_low, clip_high)
    return losses * (1 - selected), {"clip_ratio": is_clipped.to(losses), "selected": selected}


def kl_cov(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    selected: Tensor,
    *,
    kl_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A r, and a KL penalty at the tokens of highest covariance (KL-Cov; Cui et al. 2025, "The
    Entropy Mechanism of Reinforcement Learning", arXiv:2505.22617).

    -A r + kl_weight |logps - old_logps| at the share of tokens with the highest covariances, see
    `covariances`; -A r without a clip at all others, r = exp(logps - old_logps). The absolute
    difference is what the authors' code takes for the KL. It is 0 in the first optimizer step on a
    rollout.
    """
    penalty = kl_weight * selected * (logps - old_logps).abs()
    losses = penalty - advantages * ratio_of(logps - old_logps)
    return losses, {"selected": selected}


def entropy_80_20(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    selected: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `ppo` at the tokens of highest entropy, 0 without gradient at the others (Wang et
    al. 2025, "Beyond the 80/20 Rule", arXiv:2506.01939).

    A token counts if its entropy is at least the (1 - `share`) quantile of the optimizer batch.
    What divides the sum (`actor.avg_level`) counts all tokens.
    """
    losses, is_clipped = clipped(ratio_of(logps - old_logps), advantages, clip_low, clip_high)
    return losses * selected, {"clip_ratio": is_clipped * selected, "selected": selected}


def covariances(old_logps: Tensor, advantages: Tensor, action_mask: Tensor) -> Tensor:
    """(A - mean A) (logps - mean logps) of each action token, in float64, in their order: `[N]`.

    Means are over all action tokens of the batch.
    """
    a, logps = advantages[action_mask].double(), old_logps[action_mask].double()
    return (a - a.mean()) * (logps - logps.mean())


def some_between(
    old_logps: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    share: float = 2e-4,
    min_covariance: float = 1.0,
    max_covariance: float = 5.0,
) -> Tensor:
    """1 at `share` of all tokens, at least at one, drawn from those with a covariance between
    `min_covariance` and `max_covariance`, if there are as many.

    The draw's seed is the number of action tokens, so that a run that resumes draws the same.

    Raises:
        ValueError: a `share` outside of (0, 1], or bounds with nothing between them.
    """
    if min_covariance >= max_covariance:
        raise ValueError(
            f"min_covariance={min_covariance}: must be below max_covariance={max_covariance}"
        )
    cov = covariances(old_logps, advantages, action_mask)
    between = ((cov > min_covariance) & (cov < max_covariance)).nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed(len(cov))
    order = torch.randperm(len(between), generator=generator)
    chosen = torch.zeros_like(cov)
    chosen[between[order[: _count(share, len(cov))]]] = 1.0
    return _in_place(chosen, action_mask)


def highest_covariances(
    old_logps: Tensor, advantages: Tensor, action_mask: Tensor, *, share: float = 2e-3
) -> Tensor:
    """1 at the `share` of all tokens with the highest covariances, at least at one.

    Raises:
        ValueError: a `share` outside of (0, 1].
    """
    cov = covariances(old_logps, advantages, action_mask)
    return _in_place(_highest(cov, _count(share, len(cov))), action_mask)


def highest_entropies(entropy: Tensor, action_mask: Tensor, *, share: float = 0.2) -> Tensor:
    """1 at all tokens whose entropy is at least the (1 - share) quantile, which lies between
    two tokens as that of `torch.quantile`, which takes no more than 16 million of them.

    Raises:
        ValueError: a `share` outside of (0, 1].
    """
    values = entropy[action_mask]
    _check(share)
    below = math.ceil(round((1 - share) * (len(values) - 1), 6))
    return _in_place(_highest(values, len(values) - below), action_mask)


def _highest(values: Tensor, n: int) -> Tensor:
    """1 at the `n` highest ones, and at those equal to the lowest of them."""
    return (values >= values.topk(n).values[-1]).to(values)


def _count(share: float, n: int) -> int:
    _check(share)
    return max(1, int(share * n))


def _check(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must be above 0 and at most 1")


def _in_place(values: Tensor, action_mask: Tensor) -> Tensor:
    return torch.zeros(action_mask.shape).masked_scatter(action_mask, values.float())


clip_cov.select = some_between
kl_cov.select = highest_covariances
entropy_80_20.select = highest_entropies
