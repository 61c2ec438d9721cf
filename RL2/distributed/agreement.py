"""What ranks tell each other so that all of them go on, or none."""

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
    """Run something on every rank; where it fails on one, all of them raise (a collective).

    error: makes the exception from the first reason.
    """
    result, reason = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as problem:  # which is no Exception
        reason = reason_of(problem)
    if reason := first_reason(reason, group):
        raise error(reason)
    return result


def all_or_none(action: Callable[[], T]) -> T:
    """Run something on every rank (a collective). A rank where it fails raises its own error, and
    the others one that names it."""
    result, problem = None, None
    try:
        result = action()
    except Exception as error:
        problem = error
    told = of_all(problem and f"{socket.gethostname()}: {type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for which, said in enumerate(told):
        if said is not None:
            raise TrainingError(f"not started, as another rank ends: rank {which} on {said}")
    return result


def check_same(facts: Facts) -> None:
    """ConfigError on all ranks where one has other facts than rank 0 (a collective)."""
    own = socket.gethostname(), facts
    hosts, all_facts = zip(*of_all(own), strict=True)
    if line := difference(all_facts, hosts):
        raise ConfigError(line)


def reason_of(problem: BaseException) -> str:
    """The last line of what went wrong; that is where DCP puts a rank's own error."""
    lines = str(problem).strip().splitlines()
    return lines[-1].strip() if lines else type(problem).__name__


def first_reason(reason: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The reason of the first rank that has one, on every rank (a collective)."""
    if not sum_over_ranks(torch.tensor(int(reason is not None)), group):
        return None
    return next(reason for reason in of_all(reason, group) if reason is not None)


def of_all(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """A small python object of every rank, on every rank (a collective)."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def all_names(own: Iterable[str]) -> list[str]:
    """The names that any rank has, sorted, on every rank (a collective).

    A sum of numbers by name needs them first: tensors of other names, or of another size, would be
    summed position by position. The names are sent only where ranks differ.
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
