"""From per-token losses to the loss of an optimizer batch.

A reduction is a weight per token, fixed before the first forward from masks and rewards of the
*whole* optimizer batch. The batch loss is then a plain sum of weight x token loss, which does not
depend on how the tokens are spread over micro-batches and ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _token(mask: Tensor, correct: Tensor, sample: Tensor) -> Tensor:
    """All action tokens."""
    return mask / mask.sum().clamp(min=1)


def _sequence(mask: Tensor, correct: Tensor, sample: Tensor) -> Tensor:
    """All samples, each by its own tokens first."""
    return _per_token_of_its_sample(mask, sample) / max(len(sample.unique()), 1)


def _correct(mask: Tensor, correct: Tensor, sample: Tensor) -> Tensor:
    """Correct samples, which alone are trained on."""
    weights = _per_token_of_its_sample(mask, sample) * correct.unsqueeze(-1)
    return weights / max(len(sample[correct > 0].unique()), 1)


def _per_token_of_its_sample(mask: Tensor, sample: Tensor) -> Tensor:
    n_actions = mask.new_zeros(len(mask)).index_add_(0, sample, mask.sum(-1))
    return mask / n_actions[sample].unsqueeze(-1).clamp(min=1)


def _sequence_sum(mask: Tensor, correct: Tensor, sample: Tensor) -> Tensor:
    """All samples: summed over the tokens of each."""
    return mask / max(len(sample.unique()), 1)


AVG_LEVELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": _token,
    "sequence": _sequence,
    "correct": _correct,
}
KL_LEVELS = AVG_LEVELS | {"sequence_sum": _sequence_sum}


def token_weights(
    action_mask: Tensor,
    correct: Tensor,
    avg_level: str,
    sample_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights w `[B, T]` such that the batch loss is `sum(w * token_losses)`.

    Args:
        action_mask: bool `[B, T]` of the whole optimizer batch (all ranks, no padding rows).
        correct: bool `[B]`, rows whose sample has a positive summed reward.
        avg_level: `token`: 1 / (all action tokens); `sequence`: 1 / (n_i x all samples);
            `correct`: 1 / (n_i x correct samples) on correct ones, 0 elsewhere; n_i are the action
            tokens of sample i; `sequence_sum`: 1 / (all samples). Samples without action tokens
            weigh 0, and still count in the divisors of all but `token`.
        sample_ids: int64 `[B]`, the sample that each row belongs to: one of several turns that do
            not continue each other has a row for each, and weighs as much as any other. Default:
            each row is a sample of its own.
        dtype: of the weights.

    All zeros where nothing counts (no action tokens, or `correct` without a correct row); zero
    wherever `action_mask` is False.
    """
    # fp64 until the end: counts stay exact whatever the batch size.
    mask = action_mask.to(torch.float64)
    if sample_ids is None:
        sample_ids = torch.arange(len(mask), device=mask.device)
    sample = sample_ids.unique(return_inverse=True)[1]
    return KL_LEVELS[avg_level](mask, correct.to(torch.float64), sample).to(dtype)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * values) as a scalar, in which a token of weight 0 counts as 0 whatever its
    value: an infinite loss at a token without weight must not become NaN."""
    return (values.masked_fill(weights == 0, 0.0) * weights).sum()
