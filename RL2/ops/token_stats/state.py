"""Six numbers per token from which every statistic and every gradient follows.

A *state* is a tensor `[6, T]`, a summary of the columns seen so far of each token's row of
`z = logits / temperature`.

    0 top     max z                                          -inf before anything was seen
    1 index   its column, the lowest one of equal maxima     -1 before anything was seen
    2 second  max of z over the other columns                -inf if there are none
    3 mass    Q = sum over j != index of exp(z_j - second)
    4 moment  U = the same sum, of exp(z_j - second) (z_j - second)
    5 chosen  z of the action                                -inf until its column was seen

States of disjoint sets of columns merge exactly, so the same state works for vocabulary tiles and
for the shards of a tensor-parallel group.

The maximum is kept separately because 1 - p can only be lost to rounding if p is near 1, so only
for the maximum, and its 1 - p is the mass of all others. Any other token has p <= 1/2. Relative to
`second` that mass neither underflows (log(1 - p) = -1000 works) nor depends on the offset of the
logits.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from RL2.ops.token_stats.stats import NEG_INF

# exp(LOWEST) is 0 and so is 0 * LOWEST, where 0 * -inf would be NaN.
LOWEST = -1e9
_EMPTY = (NEG_INF, -1.0, NEG_INF, 0.0, 0.0, NEG_INF)


def empty_state(n_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state `[6, T]` before any column was seen."""
    start = torch.tensor(_EMPTY, dtype=dtype, device=device)
    return start.unsqueeze(-1).repeat(1, n_tokens)


def merge(low: Tensor, high: Tensor) -> Tensor:
    """The state `[6, T]` of the columns of both; `low` has the lower ones (for ties)."""
    top_l, index_l, second_l, mass_l, moment_l, chosen_l = low
    top_h, index_h, second_h, mass_h, moment_h, chosen_h = high
    loser = torch.minimum(top_l, top_h)  # of the two maxima: from now on one of the others
    second = torch.maximum(torch.maximum(second_l, second_h), loser)
    base = second.masked_fill(second == NEG_INF, 0.0)
    mass, moment = 0.0, 0.0
    for old, q, u in (
        (second_l, mass_l, moment_l),
        (second_h, mass_h, moment_h),
        (loser, torch.ones_like(loser), torch.zeros_like(loser)),
    ):
        factor = (old - base).exp()
        mass = mass + factor * q
        moment = moment + factor * (u + (old - base).clamp(min=LOWEST) * q)
    return torch.stack(
        [
            torch.maximum(top_l, top_h),
            torch.where(top_l >= top_h, index_l, index_h),
            second,
            mass,
            moment,
            torch.maximum(chosen_l, chosen_h),
        ]
    )


def merge_all(states: Sequence[Tensor]) -> Tensor:
    """The state of several sets of columns, the lowest ones first."""
    return reduce(merge, states)


def statistics(state: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """Statistics `[T]` by name, without ranks and `SEVERAL` (see `RL2.ops.token_stats.naive`).

    With R = sum over j != m of exp(z_j - z_m): log p_m = -log1p(R) and, where p_m > 1/2,
    log(1 - p_m) = log R - log1p(R). The entropy is log1p(R) plus terms that are never negative.
    """
    top, index, second, mass, moment, chosen = state
    log_rest = (second - top) + mass.log()  # log R
    rest = log_rest.exp()
    lse = rest.log1p()  # relative to top
    logps = (chosen - top) - lse
    max_log1mps = torch.where(rest < 1, log_rest - lse, torch.log1p(-(-lse).exp()))
    gap = (top - second).clamp(max=-LOWEST)
    return {
        "logps": logps,
        "log1mps": torch.where(index == actions, max_log1mps, torch.log1p(-logps.exp())),
        "max_logps": -lse,
        "max_log1mps": max_log1mps,
        "entropy": lse + (second - top - lse).exp() * (gap * mass - moment),
    }


def coefficients(
    state: Tensor,
    actions: Tensor,
    gradients: Mapping[str, Tensor],
    scale: float,
    others: Tensor | float = 0.0,
) -> Tensor:
    """The coefficients that turn a tile of logits into gradients: `[7, T]`, see `logit_gradients`.

    Args:
        state: the state `[6, T]` of the whole vocabulary.
        gradients: gradients of the objective with respect to the statistics, `[T]` by name;
            missing ones are 0.
        scale: 1 / temperature.
        others: the sum `[T]` of the gradients for log-probabilities of further columns, none of
            them m. Delta at those columns is added by the caller.

    For a column j that is neither m nor a, every statistic's gradient is p_j times a number of the
    token, plus, for the entropy, p_j (z_j - top). As p_j = (1 - p_m) exp(z_j - second) / Q, that
    is `exp(z_j - second) (slope_0 + slope_1 (z_j - top))`, which loses no precision to the offset
    of the logits, nor if 1 - p_m underflows. The value at m is a closed form; at an action that is
    not m a number is added.
    """
    top, index, second, mass, _, _ = state
    values = statistics(state, actions)
    zero = torch.zeros_like(top)
    g = {name: gradients.get(name, zero) for name in values}

    alone = second == NEG_INF  # no other token is possible: no gradient
    is_top = index == actions
    p_m, p_a = values["max_logps"].exp(), values["logps"].exp()
    odds = (second - top + mass.log()).exp()
    one_minus_p_m = odds / (1 + odds)
    odds_a = torch.where(is_top, 0.0, p_a / (1 - p_a))
    g_log1m_top = (g["max_log1mps"] + torch.where(is_top, g["log1mps"], 0.0)).masked_fill(alone, 0)
    g_log1m_a = torch.where(is_top, 0.0, g["log1mps"])
    g_logps_top = torch.where(is_top, g["logps"], 0.0)
    g_logps_a = g["logps"] - g_logps_top
    surprise = values["entropy"] + values["max_logps"]  # S + log p_m

    shared = g_log1m_a * odds_a - g["entropy"] * surprise - g_logps_a - others
    slope_0 = one_minus_p_m * (shared - g["max_logps"] - g_logps_top) + p_m * g_log1m_top
    slope_0, slope_1 = slope_0 / mass, -one_minus_p_m * g["entropy"] / mass
    at_top = one_minus_p_m * (g["max_logps"] + g_logps_top) + p_m * (shared - g_log1m_top)
    at_chosen = g_logps_a - g_log1m_a * odds_a
    # exp(z_j - inf) is 0, as it should be for columns that are impossible.
    second, slope_0 = second.masked_fill(alone, float("inf")), slope_0.masked_fill(alone, 0.0)
    slope_1 = slope_1.masked_fill(alone, 0.0)
    scaled = [scale * one for one in (slope_0, slope_1, at_top, at_chosen)]
    return torch.stack([top, index, second, *scaled])
