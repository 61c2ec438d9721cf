"""Token losses of "Exploring Paths"."""

import math

import torch
from torch import Tensor

from RL2.ops.token_stats import NEG_INF


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


def rank_jsd(
    logps: Tensor, top_logps: Tensor, *, max_rank: int = 8, detach_target: bool = True
) -> Tensor:
    """Rank-aware Jensen-Shannon divergence JSD(p', p) in nats ("Exploring Paths", section 4.3):
    the target p' promotes the sampled token to rank 1 and moves only the tokens above it.

    With k the rank of the token a (tokens of equal probability do not count as above it) and
    i_1, …, i_k = a the tokens in order: p'(a) = p(i_1), p'(i_j) = p(i_{j+1}) for j < k. A token
    below the first `max_rank` is treated as the next one after them, of rank max_rank + 1.
    Exactly 0 with exactly zero gradient at rank 1, at most log 2.

    The gradient stops at p' (`detach_target`: JSD to a fixed target), or flows through it as well.

    Args:
        logps: `[N]`.
        top_logps: `[N, K]` with K >= max_rank, descending, -inf where the vocabulary is smaller;
            only the first `max_rank` columns count.

    Raises:
        ValueError: `max_rank` below 1, or more than there are columns.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank={max_rank}: must be 1 or more")
    if top_logps.dim() != 2 or top_logps.shape[1] < max_rank:
        raise ValueError(
            f"top_logps {tuple(top_logps.shape)}: expected [N, {max_rank}] for max_rank={max_rank}"
        )
    a, above = logps.unsqueeze(-1), top_logps[:, :max_rank]
    is_above = ~(above <= a)  # a NaN stays visible
    # p'(i_j): the probability of the next token above a, or of a itself where none is left
    shifted = torch.where(is_above[:, 1:], above[:, 1:], a)
    model = torch.cat([above, a], -1)
    target = torch.cat([shifted, a, above[:, :1]], -1)
    if detach_target:
        target = target.detach()
    counts = torch.cat([is_above, is_above[:, :1]], -1)
    return _jsd_terms(target, model, counts).sum(-1)


def _weighted_log_ratio(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """exp(x) (x - y); 0 with zero gradient where not `counts` or exp(x) = 0, also at x = -inf."""
    counts = counts & (x.detach().exp() != 0)
    x, y = x.masked_fill(~counts, 0.0), y.masked_fill(~counts, 0.0)
    return (x.exp() * (x - y)).masked_fill(~counts, 0.0)


def _jsd_terms(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """(p log(p/m) + q log(q/m)) / 2 with p = exp(x), q = exp(y), m = (p + q) / 2, each >= 0;
    0 with zero gradient where not `counts`.

    It is m ((1 + t) log(1 + t) + (1 - t) log(1 - t)) / 2 with d = x - y and t = tanh(d / 2): the
    two parts of p and q have opposite signs and cancel where p ~ q, those below do not.
    """
    x, y = x.masked_fill(~counts, 0.0), y.masked_fill(~counts, 0.0)
    d = (x - y).abs()  # infinite where p or q is 0: as good as where exp(-d) is 0
    near, far = d.clamp(max=2.0), d.clamp(2.0, 800.0)
    t = (near / 2).tanh()
    divergence = torch.where(
        d < 2,
        t * near + (-t * t).log1p(),
        2 * (math.log(2) - far * (-far).sigmoid() - (-far).exp().log1p()),
    )
    return ((x.exp() + y.exp()) * divergence / 4).masked_fill(~counts, 0.0)
