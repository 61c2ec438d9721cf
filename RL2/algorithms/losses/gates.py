"""Policy gradients whose trust region is a soft gate, or a divergence, in place of a clip."""

import torch
from torch import Tensor

from RL2.algorithms.losses.ratios import ratio_of, with_gradient_of

# The thresholds of the paper for each divergence.
_MAX_DIVERGENCE = {"tv": 0.15, "kl": 0.05}


def sapo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Soft gate in place of the clip: -A sigmoid(tau (r - 1)) 4 / tau, r = exp(logps - old_logps)
    (Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv:2511.20347).

    tau is `tau_pos` where A > 0, else `tau_neg`, a larger one, as negative advantages spread over
    many tokens. At r = 1 the gradient is that of `ppo`; away from it, it fades on both sides.

    The metric `gate` is the gradient's factor, 1 at r = 1.

    Raises:
        ValueError: a tau that is not above 0.
    """
    if tau_pos <= 0 or tau_neg <= 0:
        raise ValueError(f"tau_pos={tau_pos}, tau_neg={tau_neg}: must be above 0")
    tau = torch.full_like(logps.detach(), tau_neg).masked_fill(advantages > 0, tau_pos)
    gate = (tau * (ratio_of(logps - old_logps) - 1)).sigmoid()
    return -advantages * gate * 4 / tau, {"gate": 4 * (gate * (1 - gate)).detach()}


def dppo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    divergence: str = "tv",
    max_divergence: float | None = None,
    max_ratio: float = 20.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient without the tokens that have moved too far (Qi et al. 2026, "Rethinking the
    Trust Region in LLM Reinforcement Learning", arXiv:2602.04879).

    -M A min(r, max_ratio), r = exp(logps - old_logps). M = 0 where A > 0 and r > 1, or A < 0 and
    r < 1, and the divergence D of the two policies at this token exceeds `max_divergence`, else 1.
    With p the probability of the token that was sampled, D is |p_old - p| (`tv`) or the KL of
    (p_old, 1 - p_old) from (p, 1 - p) (`kl`). So unlike in `ppo` an unlikely token may change its
    ratio a lot, a likely one only a little.

    r has its gradient beyond `max_ratio` too, as -A min(sg(r), max_ratio) logps does.
    `max_divergence` is the paper's by default, 0.15 for tv and 0.05 for kl.

    Raises:
        ValueError: another divergence, a negative bound, or a `max_ratio` below 1.
    """
    if divergence not in _MAX_DIVERGENCE:
        raise ValueError(f"divergence={divergence}: must be {' or '.join(_MAX_DIVERGENCE)}")
    bound = _MAX_DIVERGENCE[divergence] if max_divergence is None else max_divergence
    if bound < 0 or max_ratio < 1:
        raise ValueError(
            f"max_divergence={bound} must be 0 or more, max_ratio={max_ratio} 1 or more"
        )
    now, old = logps.detach().double(), old_logps.double()
    if divergence == "tv":
        distance = (now.exp() - old.exp()).abs()
    else:
        distance = _binary_kl(old, now)
    away = torch.where(advantages > 0, now > old, now < old) & (advantages != 0)
    masked = away & (distance > bound)
    weights = ratio_of(logps - old_logps).detach().clamp(max=max_ratio).masked_fill(masked, 0.0)
    losses = -advantages * weights * with_gradient_of(logps)
    return losses, {"clip_ratio": masked.to(losses)}


def _binary_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL of (p, 1 - p) from (q, 1 - q), of their logarithms x and y; infinite where q is 0 or 1 and
    p is not."""
    p, q = x.exp(), y.exp()
    not_p, not_q = -torch.expm1(x), -torch.expm1(y)
    taken = torch.xlogy(p, p) - torch.xlogy(p, q)
    return taken + torch.xlogy(not_p, not_p) - torch.xlogy(not_p, not_q)
