"""Folders that appear complete or not at all, and the lock on a run's folder."""

import errno
import fcntl
import os
import shutil
import socket
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import TextIO

from RL2.runtime.errors import ConfigError

TEMPORARY, REPLACED, REMOVED, TOKEN = ".writing-", ".replaced-", ".removed-", ".seen-"
"""Name prefixes of folders that are incomplete, replaced by another, or being removed, and of the
files by which ranks find out whether they share a folder."""


def lock(save_dir: str) -> TextIO:
    """Make this process the only one that writes to a run's folder, until the file is closed.

    The kernel releases the lock when the process ends, however it ends.

    Raises:
        ConfigError: another process has the lock, or the folder cannot be created or written to.
    """
    folder = Path(save_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(
            f"trainer.save_dir={save_dir}: cannot be written to ({error.strerror}); choose a "
            "folder in which this user may make files"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"trainer.save_dir={save_dir}: {holder} is writing there; wait until it has ended, or "
            "choose another folder"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def cannot_write(save_dir: Path, path: Path, reason: str, needed: int | None = None) -> str:
    """The message for a part of a run's folder that cannot be written: no space, or no permission.

    needed: bytes that are needed, if known.
    """
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    room = (
        f"about {needed} bytes are needed, {free} are free" if needed else f"{free} bytes are free"
    )
    return (
        f"trainer.save_dir={save_dir}: {path} cannot be written ({reason}; {room}); make room "
        "there or choose another folder"
    )


def in_the_way(save_dir: Path, error: OSError, path: Path) -> str:
    """The message for a run's folder that cannot be prepared.

    path: the path to blame if the error does not name one.
    """
    path, reason = Path(error.filename or path), error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return cannot_write(save_dir, path, reason)
    return (
        f"trainer.save_dir={save_dir}: {path} is in the way ({reason}); let this user read, "
        "write and move it, move it away yourself, or choose another folder"
    )


def exists(path: Path) -> bool:
    """Whether anything has that name, even a broken link.

    In some versions of Python, `Path.exists` returns False without permission to look; such files
    would be overwritten.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def discard(path: Path) -> None:
    """Delete a folder, a file, or a link, but never what the link points to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Make a finished folder appear under its name: flush it to disk, then rename it. A folder that
    already has the name stays until then; if this is interrupted, `clean` restores it."""
    for path in temporary.rglob("*"):
        fsync(path)
    fsync(temporary)
    old = final.with_name(f"{REPLACED}{final.name}")
    if exists(final):
        if exists(old):
            discard(old)
        final.rename(old)
    temporary.rename(final)
    fsync(final.parent)
    with suppress(OSError):  # `clean` tries again
        discard(old)


def try_to_move(path: Path) -> None:
    """Raise OSError if `path` cannot be replaced, as `publish` does at the end of a run."""
    if exists(path):
        aside = path.with_name(f"{REPLACED}{path.name}")  # if interrupted, `clean` restores it
        path.rename(aside)
        aside.rename(path)


def remove(folder: Path) -> None:
    """Delete a folder; if this is interrupted, nothing is left under its name."""
    hidden = folder.with_name(f"{REMOVED}{folder.name}")
    folder.rename(hidden)
    discard(hidden)


def clean(parent: Path) -> None:
    """Delete what a killed process left half written or half removed, and undo unfinished
    replacements."""
    for replaced in parent.glob(f"{REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not exists(final):
            replaced.rename(final)
    for unfinished in parent.glob(f"{TEMPORARY}*"):  # never links
        shutil.rmtree(unfinished, ignore_errors=True)
    for prefix in (REPLACED, REMOVED, TOKEN):
        for unfinished in parent.glob(f"{prefix}*"):
            with suppress(OSError):
                discard(unfinished)


def free_name(folder: Path, prefix: str) -> str:
    """`<prefix><name of the folder>`, with a number appended if that exists already."""
    plain = f"{prefix}{folder.name}"
    names = chain([plain], (f"{plain}-{number}" for number in count(2)))
    return next(name for name in names if not exists(folder.with_name(name)))
