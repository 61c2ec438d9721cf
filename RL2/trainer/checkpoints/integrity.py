"""Whether a checkpoint is as it was written, as all ranks see it.

There are three kinds of faults. A *damaged* checkpoint contradicts its own manifest. An
*unreadable* one cannot be read now, because of a permission, a disk or a network; its files may be
good, so they are left alone. And ranks on several machines may see *different* files of one name.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from RL2.distributed import broadcast, rank, world_size
from RL2.distributed.agreement import first_reason, of_all, reason_of
from RL2.runtime.errors import CheckpointError, RL2Error
from RL2.trainer.checkpoints import manifest

T = TypeVar("T")


class _View(NamedTuple):
    """What one rank sees. listing: what is wrong with names and sizes, which all ranks check.
    content: what is wrong with this rank's share of the bytes. digest: the manifest's digest."""

    host: str
    unreadable: str | None = None
    listing: str | None = None
    content: str | None = None
    digest: str | None = None


def damage(folder: Path, part: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint's files, by its manifest; None if nothing is.

    part: the files whose bytes are compared, see `manifest.verify`.

    Raises:
        OSError, MemoryError: it cannot be read, so its state is unknown.
    """
    view = _look(folder, part)
    return view.listing or view.content


def damage_on_all_ranks(folder: Path, key: str) -> str | None:
    """As `damage`, for all ranks, which share the work (a collective).

    Args:
        key: how messages begin, such as `trainer.load_ckpt_from=latest`.

    Raises:
        CheckpointError: a rank cannot read it, or ranks do not see the same files.
    """
    try:
        own = _look(folder, slice(rank(), None, world_size()))
    except (OSError, MemoryError) as error:
        own = _View(socket.gethostname(), unreadable=what_failed(error, folder))
    views = of_all(own)
    for which, view in enumerate(views):
        if view.unreadable is not None:
            raise CheckpointError(
                f"{key}: {folder} cannot be read{_of_rank(which, view)}: {view.unreadable}; it is "
                "left as it is: make it readable and repeat the command, or name another checkpoint"
            )
    for which, view in enumerate(views):
        if (view.listing, view.digest) != (views[0].listing, views[0].digest):
            raise _different(key, folder, which, views)
    if views[0].listing is not None:
        return views[0].listing
    for which, view in enumerate(views):
        if view.content is None:
            continue
        # Rank 0 is to rename it, so rank 0 must see the damage as well.
        if which > 0 and broadcast(_damage_on_rank_0(folder)) is None:
            raise _different(key, folder, which, views)
        return view.content
    return None


def use_on_all_ranks(action: Callable[[], T], key: str, folder: Path) -> T:
    """Use a checkpoint that is not damaged, on all ranks (a collective). A failure is not the
    checkpoint's fault, so the one before would fail as well.

    Raises:
        CheckpointError: it fails on one of them. RL2Error, Damaged: what this rank's action raises.
    """
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as problem:  # the latter is no Exception
        error = problem
    reason = first_reason(None if error is None else what_failed(error, folder))
    if isinstance(error, (RL2Error, manifest.Damaged)):
        raise error
    if reason is not None:
        raise CheckpointError(
            f"{key}: {folder} cannot be loaded ({reason}); it is left as it is: fix that and "
            "repeat the command, or name another checkpoint"
        ) from error
    return result


def what_failed(error: BaseException, path: Path) -> str:
    """An error, with the file that it is about."""
    if isinstance(error, OSError):
        return f"{os.fspath(error.filename or path)}: {error.strerror or error}"
    return reason_of(error)


def _look(folder: Path, part: slice) -> _View:
    host, digest = socket.gethostname(), None
    try:
        content = manifest.read(folder, (".metadata", "trainer.json"))
        digest = manifest.digest(content)
        for other in range(content["about"]["world_size"]):
            if f"rank{other}.pt" not in content["files"]:
                raise manifest.Damaged(f"rank{other}.pt is missing")
    except (manifest.Damaged, KeyError, TypeError) as error:
        return _View(host, listing=reason_of(error), digest=digest)
    try:
        manifest.verify(folder, content, part)
    except (manifest.Damaged, KeyError, TypeError) as error:
        return _View(host, content=reason_of(error), digest=digest)
    return _View(host, digest=digest)


def _damage_on_rank_0(folder: Path) -> str | None:
    """Rank 0: what is wrong with any of the files; a missing file counts as well."""
    if rank() != 0:
        return None
    try:
        return damage(folder)
    except (OSError, MemoryError):
        return None


def _different(key: str, folder: Path, which: int, views: list[_View]) -> CheckpointError:
    first, other = (
        view.listing or view.content or "it is whole" for view in (views[0], views[which])
    )
    if first == other:
        first, other = "one checkpoint", "another one of that name"
    return CheckpointError(
        f"{key}: {folder} is not the same for all ranks: rank 0 ({views[0].host}) finds: {first}; "
        f"rank {which} ({views[which].host}) finds: {other}; it is left as it is: give a folder "
        "that all machines share"
    )


def _of_rank(which: int, view: _View) -> str:
    return f" by rank {which} ({view.host})" if world_size() > 1 else ""
