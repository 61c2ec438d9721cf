"""Moves what a run's folder holds of other runs out of the way; nothing is deleted."""

import json
import logging
import os
import shutil
from itertools import count
from pathlib import Path

from RL2.runtime.folders import exists
from RL2.trainer.checkpoints import record

logger = logging.getLogger(__name__)

_RUN_FILES = (
    "checkpoints", "best", "final", "rollouts", "metrics.jsonl",
    record.CONFIG, record.RUN, record.EARLIER,
)  # fmt: skip


def set_aside(run: Path, beyond: list[Path], step: int) -> None:
    """Move to `before1` … what a run that resumes after `step` does not continue.

    A run that starts anew, or from a checkpoint of another folder (`step` 0), continues nothing in
    its own folder; a resumed one continues nothing beyond `step`. Left in place, those checkpoints
    would count as newer than this run's own: `latest` would resume from them and `keep_last` would
    keep them. Models made from them are moved as well; metrics and later rollouts are copied, as
    the resumed run may have written some of them itself (`rollout.staleness=1`).

    Args:
        beyond: the checkpoints of later steps, newest first.

    Raises:
        OSError: one of them cannot be moved. The error names it, and nothing is moved.
    """
    shared: list[Path] = []
    old = beyond
    if step == 0:
        old = [run / name for name in _RUN_FILES]
    elif beyond:
        models = ["final", "best"] if _best_step(beyond[0]) > step else ["final"]
        rollouts = sorted((run / "rollouts").glob("step*.jsonl"))
        shared = [path for path in rollouts if path.name > f"step{step + 1:06d}"]
        shared.append(run / "metrics.jsonl")
        old = [*beyond, *(run / name for name in models)]
    old = [path for path in old if exists(path)]
    if not old:
        return
    aside = move_aside(run, old, [path for path in shared if exists(path)])
    what = "an earlier run" if step == 0 else f"checkpoints beyond step {step}"
    logger.warning("%s: %s moved aside to %s", run, what, aside)


def _best_step(checkpoint: Path) -> int:
    """The step of the best evaluation so far; 0 if there is none, or the file is damaged."""
    text = (checkpoint / "trainer.json").read_bytes() if exists(checkpoint / "trainer.json") else ""
    try:
        return json.loads(text)["best"]["step"]
    except (ValueError, LookupError, TypeError):
        return 0


def move_aside(run: Path, moved: list[Path], copied: list[Path] = ()) -> Path:
    """Move, or copy, things of a run's folder to a new folder `before…` in it, which is returned.

    Raises:
        OSError: one of them cannot be moved. The error names it, and all others are moved back.
    """
    aside = next(path for n in count(1) if not exists(path := run / f"before{n}"))
    done: list[tuple[Path, Path]] = []
    try:
        for path in copied:
            target = _room_for(path, run, aside)
            shutil.copy2(path, target)
        for path in moved:
            target = _room_for(path, run, aside)
            path.rename(target)
            done.append((path, target))
    except OSError:
        for path, target in reversed(done):
            target.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path, target in done:
        _keep_pointing(target, path)
    return aside


def _room_for(path: Path, run: Path, aside: Path) -> Path:
    target = aside / path.relative_to(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _keep_pointing(moved: Path, before: Path) -> None:
    """Make moved relative links point to where they pointed before."""
    links = [moved] if moved.is_symlink() else [*moved.glob("*")] if moved.is_dir() else []
    for link in links:
        if link.is_symlink() and not os.path.isabs(goal := os.readlink(link)):
            parent = before.parent if link == moved else before
            link.unlink()
            link.symlink_to(os.path.normpath(parent.resolve() / goal))
