"""Which checkpoints a run's folder holds, under which names."""

import os
import re
from pathlib import Path

from RL2.distributed import broadcast, rank
from RL2.distributed.agreement import on_all_ranks
from RL2.runtime.errors import CheckpointError
from RL2.runtime.folders import exists, free_name, fsync, remove

_LATEST = "latest"
_DAMAGED = "damaged-"
_STEP = re.compile(r"step(\d{6,})")


def of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, once it is complete."""
    return folder / f"step{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(_STEP.fullmatch(checkpoint.name)[1])


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first. Copies with other names are ignored: they are neither
    resumed from nor pruned."""
    found = (folder / name for name in _names(folder) if _STEP.fullmatch(name))
    return sorted(found, key=step_of, reverse=True)


def tidy(folder: Path, keep_last: int | None) -> None:
    """Rank 0: have `latest` name the newest checkpoint; keep only the newest `keep_last`."""
    for newest in complete(folder)[:1]:
        pointer = folder / f".{_LATEST}"
        pointer.write_text(newest.name)
        fsync(pointer)
        pointer.replace(folder / _LATEST)
    for old in complete(folder)[keep_last:] if keep_last else []:
        remove(old)


def rename_damaged(checkpoint: Path) -> str:
    """Rename a checkpoint, so that it is not tried again (a collective); returns its new name."""
    name = broadcast(free_name(checkpoint, _DAMAGED))
    on_all_ranks(
        lambda: checkpoint.rename(checkpoint.with_name(name)) if rank() == 0 else None,
        lambda reason: CheckpointError(
            f"{checkpoint} is damaged and cannot be renamed to {name} ({reason}); move it away"
        ),
    )
    return name


def lost(folder: Path, damaged: list[tuple[Path, str]]) -> str | None:
    """Rank 0: what shows that there was a run to resume, of which no checkpoint loads; None if
    there was none. The answer stays the same when the command is repeated: a run that starts
    anew would move that run aside.

    damaged: the checkpoints found damaged now, and why.
    """
    before = (name for name in _names(folder) if name.startswith(_DAMAGED))
    names = {*(checkpoint.name for checkpoint, _ in damaged), *before}
    if names:
        why = f" ({damaged[0][0].name}: {damaged[0][1]})" if damaged else ""
        return f"none of {len(names)} checkpoints under {folder} loads{why}"
    pointer = folder / _LATEST
    if _LATEST in _names(folder):
        return f"{pointer} names {pointer.read_text():.80}, which is not there"
    return None


def _names(folder: Path) -> list[str]:
    """The names in the folder, if it exists. A folder that cannot be read raises."""
    return os.listdir(folder) if exists(folder) else []
