"""Token statistics: names, container, argument checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class TokenStats:
    """Statistics of T tokens, each `[T]` in fp32 (fp64 for fp64 inputs); None if not wanted.

    Log-probabilities and entropy are in nats, at the given temperature. `ranks` has no gradient,
    counts from 1, and is a float like the others. `top_logps [T, K]` holds the K largest
    log-probabilities in descending order, -inf if there are fewer tokens; which one of several
    equal tokens gets a gradient is not defined. `top_ids [T, K]` are those tokens, int32, -1 if
    there are fewer. `at_logps [T, K]` are the log-probabilities of tokens that the caller names for
    each position, -inf without gradient for the token -1.
    """

    logps: Tensor | None = None
    log1mps: Tensor | None = None
    max_logps: Tensor | None = None
    max_log1mps: Tensor | None = None
    entropy: Tensor | None = None
    ranks: Tensor | None = None
    top_logps: Tensor | None = None
    top_ids: Tensor | None = None
    at_logps: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The statistics that were computed, by name (the tensors themselves, not copies)."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}


STATISTICS: tuple[str, ...] = tuple(field.name for field in fields(TokenStats))
SEVERAL = ("top_logps", "top_ids", "at_logps")
"""Statistics with several numbers per token."""
CONSTANT = ("ranks", "top_ids")
"""Statistics without a gradient."""


# (statistics of consecutive tokens, their slice of all) -> (sum of losses, {metric: sum})
LossFunction = Callable[[TokenStats, slice], tuple[Tensor, dict[str, Tensor]]]


def loss_of(
    stats: TokenStats, n_tokens: int, loss_fn: LossFunction
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss_fn` over all `n_tokens` tokens in one chunk; the metrics without gradients."""
    loss, metrics = loss_fn(stats, slice(0, n_tokens))
    return loss, {name: value.detach() for name, value in metrics.items()}


class VocabularyShard(Protocol):
    """This rank's part of a vocabulary that is split over the ranks of a tensor-parallel group.

    `weight` and `bias` then hold the columns `start`, `start + 1`, … `start + columns - 1` of the
    vocabulary (rows of `weight` beyond `columns` are padding, `columns` may be 0), and every rank
    of the group makes the same call with the same `hidden` and `actions`.
    """

    start: int
    columns: int
    widest: int  # the largest `columns` of all ranks, so that all split the tokens in the same way

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[n_ranks, *tensor.shape]`, in the order of `start`."""
        ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place."""
        ...


def check_arguments(
    logits: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    top_k: int = 0,
    at: Tensor | None = None,
) -> None:
    """Raise ValueError for invalid arguments of `token_stats`."""
    if logits.dim() != 2 or logits.shape[1] == 0 or actions.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and actions {tuple(actions.shape)}: "
            "expected [T, V] with V >= 1 and [T]"
        )
    _check_request(actions, temperature, wanted, top_k, at)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    temperature: float,
    wanted: Sequence[str],
    top_k: int = 0,
    shard: VocabularyShard | None = None,
    at: Tensor | None = None,
) -> None:
    """Raise ValueError for invalid arguments of `linear_token_stats`."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected [T, H] and [V, H]"
        )
    if (shard is None and len(weight) == 0) or actions.shape != hidden.shape[:1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} and actions {tuple(actions.shape)}: "
            f"expected [V, H] with V >= 1 and [{len(hidden)}]"
        )
    if shard is not None and not 0 <= shard.columns <= len(weight):
        raise ValueError(
            f"shard.columns={shard.columns}: must be between 0 and the {len(weight)} rows of weight"
        )
    _check_request(actions, temperature, wanted, top_k, at)


def _check_request(
    actions: Tensor, temperature: float, wanted: Sequence[str], top_k: int, at: Tensor | None
) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    unknown = [name for name in wanted if name not in STATISTICS]
    if isinstance(wanted, str) or unknown:
        raise ValueError(f"wanted={wanted!r}: expected a list of names from {STATISTICS}")
    if {"top_logps", "top_ids"} & {*wanted} and top_k < 1:
        raise ValueError(f"top_k={top_k}: top_logps needs at least 1")
    if "at_logps" in wanted and (at is None or at.dim() != 2 or len(at) != len(actions)):
        got = None if at is None else tuple(at.shape)
        raise ValueError(f"at={got}: at_logps needs the tokens, [{len(actions)}, K]")


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
