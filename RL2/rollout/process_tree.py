"""What a process has started, all the way down: who it is, and how it is ended.

A process that begins a session of its own (setsid, a daemon) leaves its process group, but it
cannot leave its ancestors: where its parent ends, the next ancestor that adopts orphans gets it. On
Linux that is any process that asks for it; elsewhere it is init, and what has lost its parent is
found no more. Needs nothing but the standard library: guards load this file by its folder.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PAUSE = 0.005  # seconds between two looks at what is being killed
_MOST_PAUSE = 0.25

# What ends a process that does not listen, and what people, schedulers and terminals send to have
# one end: kill, Ctrl-C, a terminal that closes, Ctrl-\, a time limit, a power supply.
ASKING = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR")
# What ends it as well, and libraries use for themselves.
OTHERS = ("ALRM", "VTALRM", "PROF", "IO", "ABRT", "STKFLT")


def numbers(names: Collection[str]) -> tuple[int, ...]:
    """Signals by name, without those that this system does not have."""
    return tuple(getattr(signal, f"SIG{name}") for name in names if hasattr(signal, f"SIG{name}"))


def adopt_orphans() -> None:
    """From here on, descendants of this process stay its descendants (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Have this process killed when its parent ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(root: int, spared: Collection[int] = ()) -> list[int]:
    """All processes below `root`, parents first; without those in `spared` and below them."""
    return [pid for pid, _ in _below(root, spared)]


def kill_below(
    root: int, reap: Callable[[list[int]], None], seconds: float, spared: Collection[int] = ()
) -> bool:
    """Kill all descendants of `root` until none is left; whether that came true in `seconds`.

    What may not be killed, as it runs for another user, is left out. reap: is called with those
    that were killed, whose statuses somebody has to collect before they are gone.
    """
    deadline, pause = time.monotonic() + seconds, _PAUSE
    while True:
        below = _below(root, spared)
        found = {pid for pid, _ in below}
        # A whole group at once where it is theirs, which outruns one that multiplies.
        groups = {group for _, group in below if group in found}
        left = [_kill(os.killpg, group) for group in groups]
        left += [_kill(os.kill, pid) for pid in found]
        reap([pid for pid, _ in below])
        if not any(left):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _MOST_PAUSE)


def reap_each(pids: list[int]) -> None:
    """Collect the statuses of those that are children of this process."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


def _kill(send: Callable[[int, int], None], pid: int) -> bool:
    """Whether there was somebody to be killed."""
    try:
        send(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _below(root: int, spared: Collection[int]) -> list[tuple[int, int]]:
    """(pid, process group) of all below `root`, parents first."""
    children: dict[int, list[tuple[int, int]]] = {}
    for pid, parent, group in _processes():
        if pid not in spared:
            children.setdefault(parent, []).append((pid, group))
    found = list(children.get(root, []))
    for pid, _ in found:  # which grows
        found += children.get(pid, [])
    return found


def _processes() -> Iterator[tuple[int, int, int]]:
    """(pid, parent, process group) of every process."""
    if not os.path.exists("/proc/self/stat"):
        # macOS and the BSDs.
        command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "pgid="]
        try:
            listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        except OSError:  # it cannot be known
            return
        yield from (tuple(map(int, line.split())) for line in listed)
        return
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # "pid (name) state ppid pgrp": a name may hold spaces and brackets.
                    _, parent, group = file.read().rpartition(b")")[2].split()[:3]
            except (OSError, ValueError):
                continue  # it ended meanwhile
            yield int(entry), int(parent), int(group)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
