"""From per-token losses to the loss of an optimizer batch.

A reduction is a weight per token, fixed before the first forward from masks and rewards of the
*whole* optimizer batch. The batch loss is then a plain sum of weight x token loss, which does not
depend on how the tokens are spread over micro-batches and ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from RL2.config.errors import ConfigError


def _token(mask: Tensor, correct: Tensor) -> Tensor:
    return mask / mask.sum().clamp(min=1)


def _sequence(mask: Tensor, correct: Tensor) -> Tensor:
    return _per_token_of_its_row(mask) / max(len(mask), 1)


def _correct(mask: Tensor, correct: Tensor) -> Tensor:
    weights = _per_token_of_its_row(mask) * correct.unsqueeze(-1)
    return weights / correct.sum().clamp(min=1)


def _per_token_of_its_row(mask: Tensor) -> Tensor:
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


AVG_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": _token,
    "sequence": _sequence,
    "correct": _correct,
}


def token_weights(
    action_mask: Tensor, correct: Tensor, avg_level: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights w `[B, T]` such that the batch loss is `sum(w * token_losses)`.

    Args:
        action_mask: bool `[B, T]` of the whole optimizer batch (all ranks, no padding rows).
        correct: bool `[B]`, rows whose sample has a positive summed reward.
        avg_level: `token`: 1 / (all action tokens); `sequence`: 1 / (n_i x all rows);
            `correct`: 1 / (n_i x correct rows) on correct rows, 0 elsewhere; n_i are the action
            tokens of row i. Rows without action tokens weigh 0, and still count as rows in the
            divisors of `sequence` and `correct`.
        dtype: of the weights.

    All zeros where nothing counts (no action tokens, or `correct` without a correct row); zero
    wherever `action_mask` is False.

    Raises:
        ConfigError: an unknown `avg_level`.
    """
    if avg_level not in AVG_LEVELS:
        raise ConfigError(f"actor.avg_level={avg_level}: unknown; use {', '.join(AVG_LEVELS)}")
    # fp64 until the end: counts stay exact whatever the batch size.
    mask = action_mask.to(torch.float64)
    return AVG_LEVELS[avg_level](mask, correct.to(torch.float64)).to(dtype)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * values) as a scalar, in which a token of weight 0 counts as 0 whatever its
    value: an infinite loss at a token that owes nothing must not become NaN."""
    return (values.masked_fill(weights == 0, 0.0) * weights).sum()
