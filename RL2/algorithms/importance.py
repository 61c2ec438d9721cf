"""Weights for tokens that were sampled from another distribution than the trained one."""

from collections.abc import Callable

from torch import Tensor


def _truncate(ratio: Tensor, bound: float) -> Tensor:
    """Ratios above C count as C."""
    return ratio.clamp(max=bound)


def _mask(ratio: Tensor, bound: float) -> Tensor:
    """Tokens outside of 1/C to C count for nothing."""
    return ratio.masked_fill((ratio > bound) | (ratio < 1 / bound), 0.0)


TIS_TYPES: dict[str, Callable[[Tensor, float], Tensor]] = {"truncate": _truncate, "mask": _mask}


def importance_weights(old_logps: Tensor, llm_logps: Tensor, bound: float, kind: str) -> Tensor:
    """Weight of each token, from its ratio r = exp(old_logps - llm_logps), without gradient.

    `truncate`: min(r, bound), truncated importance sampling (Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"). The tokens beyond stay, with a bias.
    `mask`: r where 1/bound <= r <= bound, else 0, double-sided masking (IcePop; Ling Team 2025,
    "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model",
    arXiv:2510.18855). On such tokens the engine and the trainer disagree, so they teach nothing.

    Args:
        old_logps: those of the trainer before the first update with these tokens. A loss that names
            old_logps has a ratio of its own for later updates, which would count twice here.
        llm_logps: those of the engine that sampled them.
        bound: C, 1 or more for `mask`.
    """
    return TIS_TYPES[kind]((old_logps.detach() - llm_logps).exp(), bound)
