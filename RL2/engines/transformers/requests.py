"""Requests that wait for the model, and the batches made from them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from RL2.engines.protocol import Completion, SamplingParams


@dataclass
class Request:
    token_ids: list[int]
    sampling: SamplingParams
    seed: int
    future: asyncio.Future
    aborted: bool = False


def aborted() -> Completion:
    """The completion of a request that was aborted before it had a token."""
    return Completion([], [], "abort", [])


def plan_batches(requests: list[Request], max_batch_size: int, sort: bool) -> list[list[Request]]:
    """Cut requests into batches with equal sampling parameters; with `sort`, by length."""
    groups: dict[SamplingParams, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.sampling, []).append(request)
    batches = []
    for group in groups.values():
        if sort:
            # Not in order of arrival, which depends on the speed of environments.
            group.sort(key=lambda one: (len(one.token_ids), one.token_ids, one.seed))
        batches += [group[i : i + max_batch_size] for i in range(0, len(group), max_batch_size)]
    return batches


def fail(requests: list[Request], error: Exception) -> None:
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error)
