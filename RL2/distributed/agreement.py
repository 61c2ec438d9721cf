"""How ranks agree, so that either all of them continue or none."""

import hashlib
import socket
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from RL2.distributed.comm import sum_over_ranks
from RL2.distributed.process_group import world_size
from RL2.distributed.same_start import Facts, difference
from RL2.runtime.errors import ConfigError, RL2Error, TrainingError

T = TypeVar("T")


def on_all_ranks(
    action: Callable[[], T],
    error: Callable[[str], RL2Error],
    group: dist.ProcessGroup | None = None,
) -> T:
    """Run something on every rank; if it fails on one, all of them raise (a collective).

    error: makes the exception from the first reason.
    """
    result, reason = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as problem:  # not an Exception
        reason = reason_of(problem)
    if reason := first_reason(reason, group):
        raise error(reason)
    return result


def all_or_none(action: Callable[[], T]) -> T:
    """Run something on every rank (a collective). A rank where it fails raises its own error; the
    others raise one that names that rank."""
    result, problem = None, None
    try:
        result = action()
    except Exception as error:
        problem = error
    problems = of_all(problem and f"{socket.gethostname()}: {type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for which, text in enumerate(problems):
        if text is not None:
            raise TrainingError(f"not started, as another rank ends: rank {which} on {text}")
    return result


def check_same(facts: Facts) -> None:
    """Raise ConfigError on all ranks if one has other facts than rank 0 (a collective)."""
    own = socket.gethostname(), facts
    hosts, all_facts = zip(*of_all(own), strict=True)
    if line := difference(all_facts, hosts):
        raise ConfigError(line)


def reason_of(problem: BaseException) -> str:
    """The last line of an error, where DCP puts a rank's own error."""
    lines = str(problem).strip().splitlines()
    return lines[-1].strip() if lines else type(problem).__name__


def first_reason(reason: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """On every rank, the reason of the first rank that has one (a collective)."""
    if not sum_over_ranks(torch.tensor(int(reason is not None)), group):
        return None
    return next(reason for reason in of_all(reason, group) if reason is not None)


def of_all(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """On every rank, a small python object from each rank (a collective)."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def all_names(own: Iterable[str]) -> list[str]:
    """On every rank, the sorted names that any rank has (a collective).

    A sum of numbers by name needs them first: otherwise numbers of different names would be summed
    by position. The names are only sent if the ranks differ.
    """
    own = sorted(own)
    if world_size() == 1:
        return own
    text = "\0".join(own).encode(errors="surrogatepass")
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes[0] == -extremes[1]:
        return own
    return sorted({name for names in of_all(own) for name in names})
