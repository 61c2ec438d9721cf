"""Distances to a teacher's distribution, on the K tokens that the teacher thinks most likely.

q_k and p_k are the probabilities that teacher and student give these tokens. What both give to all
other tokens is one more event, the *rest*, unless `rest=False`, which divides q and p by their sums
over the K tokens. With the rest a divergence is never larger than the one over the whole
vocabulary (joining events cannot raise it), and equals it where K is the size of the vocabulary.
Without, a student may move probability to tokens outside of the K for free.
"""

import torch
from torch import Tensor

from RL2.ops.token_stats import NEG_INF


def topk_kl(
    at_logps: Tensor, teacher_top_logps: Tensor, *, rest: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL from the teacher to the student, sum q log(q / p) (forward KL, word-level distillation of
    Kim and Rush 2016), on the teacher's most likely tokens.

    The metric `teacher_mass` is the probability that the teacher gives them.

    Args:
        at_logps: `[N, K]` log p.
        teacher_top_logps: `[N, K]` log q, -inf where there are fewer tokens.
    """
    p, q, counts = _events(at_logps, teacher_top_logps, rest)
    terms = q.exp() * (q - p)
    return terms.masked_fill(~counts, 0.0).sum(-1), _mass(teacher_top_logps)


def topk_jsd(
    at_logps: Tensor, teacher_top_logps: Tensor, *, jsd_beta: float = 0.5, rest: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD) on the teacher's most likely
    tokens: beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p, beta = `jsd_beta`.

    As in TRL, 0 is KL(q, p) and 1 is KL(p, q); arguments and metric are those of `topk_kl`.

    Raises:
        ValueError: `jsd_beta` outside of [0, 1].
    """
    beta = jsd_beta
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd_beta={beta}: must lie between 0 and 1")
    if beta == 0:
        return topk_kl(at_logps, teacher_top_logps, rest=rest)
    p, q, counts = _events(at_logps, teacher_top_logps, rest)
    if beta == 1:
        terms = _weighted(p, p - q)
    else:
        # log(m / q) and log(m / p), neither of which is far from 0 where p and q are equal
        of_q = torch.log1p((1 - beta) * torch.expm1((p - q).clamp(max=80.0)))
        of_q = torch.where(p - q > 80, (p - q) + torch.log(torch.tensor(1 - beta)), of_q)
        terms = -beta * q.exp() * of_q + (1 - beta) * _weighted(p, (p - q) - of_q)
    return terms.masked_fill(~counts, 0.0).sum(-1), _mass(teacher_top_logps)


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """exp(p) x; 0 with zero gradient where exp(p) is 0."""
    zero = p.detach().exp() == 0
    return (p.exp() * x.masked_fill(zero, 0.0)).masked_fill(zero, 0.0)


def _events(at_logps: Tensor, teacher_top_logps: Tensor, rest: bool) -> tuple[Tensor, ...]:
    """log p and log q of the events `[N, K or K + 1]`, and which of them count; the others are 0.

    Neither rest is taken to be smaller than what rounding leaves of 1 - sum p, which has no digits
    there.
    """
    counts = ~(teacher_top_logps == NEG_INF)  # a NaN stays visible
    q, p = teacher_top_logps.masked_fill(~counts, NEG_INF), at_logps.masked_fill(~counts, NEG_INF)
    if not rest:
        p, q = p - _log_sum(p), q - _log_sum(q)
        return p.masked_fill(~counts, 0.0), q.masked_fill(~counts, 0.0), counts
    least = 16 * torch.finfo(q.dtype).eps
    left_q, left_p = ((1 - x.exp().sum(-1, keepdim=True)) for x in (q, p))
    counts = torch.cat([counts, torch.ones_like(counts[:, :1])], -1)
    q = torch.cat([q, left_q.clamp(min=least).log()], -1)
    p = torch.cat([p, left_p.clamp(min=least).log()], -1)
    return p.masked_fill(~counts, 0.0), q.masked_fill(~counts, 0.0), counts


def _log_sum(logps: Tensor) -> Tensor:
    return logps.logsumexp(-1, keepdim=True)


def _mass(teacher_top_logps: Tensor) -> dict[str, Tensor]:
    return {"teacher_mass": teacher_top_logps.exp().sum(-1)}
