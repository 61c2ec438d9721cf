"""Token statistics of a linear head: the numbers from which every token loss is computed.

For one position let `z = logits / temperature` (fp32), `p = softmax(z)`, `a` the token that was
written, `m = argmax z` (the lowest index wins a tie) and `S` the entropy:

    name          value                      gradient with respect to z
    logps         log p_a                    delta_a - p
    log1mps       log(1 - p_a)               -p_a at a, p_a exp(z_j - lse_{i != a} z_i) at j != a
    max_logps     log p_m                    delta_m - p
    max_log1mps   log(1 - p_m)               as log1mps, with m for a
    entropy       -sum_j p_j log p_j         -p_j (log p_j + S)
    ranks         1 + #{j : z_j > z_a}       none
    top_logps     log p_{i_1 … i_K}, the K   delta_{i_k} - p
                  largest, descending [T, K]
    top_ids       i_1 … i_K [T, K]           none
    at_logps      log p_{j_1 … j_K}, at      delta_{j_k} - p
                  given tokens j [T, K]

This is the plain version: it stores the full logits and leaves the backward pass to autograd.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from RL2.ops.token_stats.stats import (
    CONSTANT,
    NEG_INF,
    TokenStats,
    check_arguments,
    check_head,
    statistics_dtype,
)


def naive_token_stats(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    bias: Tensor | None = None,
    *,
    top_k: int = 0,
    at: Tensor | None = None,
) -> TokenStats:
    """`linear_token_stats` (see there for the arguments) with all logits in fp32.

    bf16 and fp16 inputs are promoted before the product, and autocast has no effect.

    Raises:
        ValueError: wrong shapes, an unknown name in `wanted`, a temperature that is not positive,
            `top_logps` with `top_k` below 1.
    """
    check_head(hidden, weight, actions, temperature, wanted, top_k, at=at)
    dtype = statistics_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
        return token_stats(logits, actions, temperature, wanted, top_k, at)


def token_stats(
    logits: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    top_k: int = 0,
    at: Tensor | None = None,
) -> TokenStats:
    """Statistics of `softmax(logits / temperature)` at `actions`.

    Args:
        logits: `[T, V]`, not changed. A row needs one finite entry; -inf entries are tokens of
            probability 0. If only one token is possible, `max_log1mps` is -inf and has no
            gradient.
        actions, temperature, wanted, top_k, at: as in `linear_token_stats`.

    Raises:
        ValueError: wrong shapes, an unknown name in `wanted`, a temperature that is not positive,
            `top_logps` with `top_k` below 1.
    """
    check_arguments(logits, actions, temperature, wanted, top_k, at)
    z = logits.to(statistics_dtype(logits)) / temperature
    chosen = actions.unsqueeze(-1)
    maxima = z.detach().argmax(-1, keepdim=True)  # the first of equal maxima
    stats = {}

    # Compare before the shift, which may round different logits to the same number.
    if "ranks" in wanted:
        with torch.no_grad():
            stats["ranks"] = 1 + (z > z.gather(-1, chosen)).sum(-1).to(z.dtype)
    largest = _largest(z.detach(), top_k) if {"top_logps", "top_ids"} & {*wanted} else None
    if "top_ids" in wanted:
        stats["top_ids"] = largest.int()
    if not {*wanted} - {*CONSTANT}:
        return TokenStats(**stats)

    # Relative to the maximum, nothing depends on the offset of the logits: p_m = 1 / (1 + odds)
    # with odds = sum over j != m of exp(z_j - z_m). No sum below has terms of both signs, and
    # only the maximum needs the sum without itself: any other token has p <= 1/2.
    z = z - z.gather(-1, maxima)
    log_odds_rest = _logsumexp_without(z, maxima)
    odds_rest = log_odds_rest.exp()
    lse = odds_rest.log1p()
    logps = z.gather(-1, chosen).squeeze(-1) - lse

    if "logps" in wanted:
        stats["logps"] = logps
    if "max_logps" in wanted:
        stats["max_logps"] = -lse
    if "top_logps" in wanted:
        stats["top_logps"] = _at(z, largest, lse)
    if "at_logps" in wanted:
        stats["at_logps"] = _at(z, at.long(), lse)
    if "log1mps" in wanted or "max_log1mps" in wanted:
        max_log1mps = torch.where(
            odds_rest < 1, log_odds_rest - lse, _log1mexp(-lse, ~(odds_rest < 1))
        )
        if "max_log1mps" in wanted:
            stats["max_log1mps"] = max_log1mps
        if "log1mps" in wanted:
            is_max = (chosen == maxima).squeeze(-1)
            stats["log1mps"] = torch.where(is_max, max_log1mps, _log1mexp(logps, ~is_max))
    if "entropy" in wanted:
        # p_j (z_m - z_j) is 0 where z_j = -inf; filling the factor keeps its gradient 0 too.
        gaps = -z.masked_fill(z == NEG_INF, 0.0)
        stats["entropy"] = lse + ((z - lse.unsqueeze(-1)).exp() * gaps).sum(-1)
    return TokenStats(**stats)


def _at(z: Tensor, columns: Tensor, lse: Tensor) -> Tensor:
    """log p of the `columns [T, K]`; -inf without gradient at -1, and where z is -inf."""
    found = z.gather(-1, columns.clamp(min=0))
    missing = (columns < 0) | (found == NEG_INF)
    return (found - lse.unsqueeze(-1)).masked_fill(missing, NEG_INF)


def _logsumexp_without(z: Tensor, excluded: Tensor) -> Tensor:
    """logsumexp over the columns other than `excluded` `[T, 1]`; -inf without gradient if none."""
    rest = z.scatter(-1, excluded, NEG_INF)
    top = rest.detach().amax(-1, keepdim=True)
    alone = top == NEG_INF
    # The gradient of a logsumexp over only -inf is NaN: sum zeros there instead. Over numbers
    # around -1000 it loses three digits: shift the largest to 0.
    rest = (rest - top).masked_fill(alone, 0.0)
    return (rest.logsumexp(-1, keepdim=True) + top).squeeze(-1)


def _largest(z: Tensor, k: int) -> Tensor:
    """Columns `[T, k]` of the k largest entries, descending, the lowest column first among equal
    ones (whose order is arbitrary in `topk`); -1 where no finite entry is left."""
    rest, columns = z.clone(), []
    for _ in range(k):
        column = rest.argmax(-1, keepdim=True)
        columns.append(column.masked_fill(rest.gather(-1, column) == NEG_INF, -1))
        rest.scatter_(-1, column, NEG_INF)
    return torch.cat(columns, -1)


def _log1mexp(logp: Tensor, where: Tensor) -> Tensor:
    """log(1 - exp(logp)) for probabilities of at most 1/2, `where` they are; 0 elsewhere."""
    return torch.log1p(-logp.masked_fill(~where, NEG_INF).exp())
