"""What a critic learns."""

import torch
from torch import Tensor


def value(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error (Schulman et al. 2017, as their code has it): max((V - ret)^2,
    (V' - ret)^2) with V' = clip(V, V_old - clip, V_old + clip), without a factor of 1/2.

    The metric `clip_ratio` is 1 at tokens where the clipped error is the larger one.
    """
    # not old + clamp(V - old): what is within the clip must stay V to the last digit
    limited = values.clamp(old_values - clip, old_values + clip)
    error, clipped = (values - returns).square(), (limited - returns).square()
    return torch.maximum(error, clipped), {"clip_ratio": (clipped > error).to(error)}
