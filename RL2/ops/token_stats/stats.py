"""What a token statistic is: names, container, argument checks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class TokenStats:
    """Statistics of T tokens, each `[T]` in fp32 (fp64 for fp64 inputs); None if not wanted.

    Log-probabilities and entropy are in nats, at the temperature that was asked for. `ranks`
    carries no gradient, counts from 1, and is a float like the others.
    """

    logps: Tensor | None = None
    log1mps: Tensor | None = None
    max_logps: Tensor | None = None
    max_log1mps: Tensor | None = None
    entropy: Tensor | None = None
    ranks: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The statistics that were computed, by name (the tensors themselves, not copies)."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}


STATISTICS: tuple[str, ...] = tuple(field.name for field in fields(TokenStats))


def check_arguments(
    logits: Tensor, actions: Tensor, temperature: float, wanted: Sequence[str]
) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or actions.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and actions {tuple(actions.shape)}: "
            "expected [T, V] with V >= 1 and [T]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    unknown = [name for name in wanted if name not in STATISTICS]
    if isinstance(wanted, str) or unknown:
        raise ValueError(f"wanted={wanted!r}: expected a list of names out of {STATISTICS}")


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
