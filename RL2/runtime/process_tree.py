"""Find and end all descendants of a process.

A process that starts its own session (setsid, a daemon) leaves its process group, but not its
ancestors: if its parent ends, the next ancestor that adopts orphans becomes its parent. On Linux
any process can ask for that; elsewhere only init adopts, and orphans can no longer be found.
Standard library only: guards load this file from its folder.

Not psutil: it is no faster (23 ms against 21 for 190 processes), and can neither adopt orphans nor
tie a process to its parent. `-S` leaves out installed packages, so a guard would also start three
times as slowly (0.6 s against 0.2 on a busy machine), and each environment process waits for one.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PAUSE = 0.005  # seconds between two checks of what is being killed
_MOST_PAUSE = 0.25
# In command lines: our guards, and helpers that end by themselves when no longer needed.
_OURS = (
    os.path.dirname(os.path.abspath(__file__)).encode() + b"/",
    b"multiprocessing.resource_tracker",
    b"_inductor/compile_worker",
)

# Signals that report a fault, or cannot or need not be handled.
_FAULTS = {"SEGV", "BUS", "FPE", "ILL", "TRAP", "SYS", "KILL", "STOP", "CHLD"}


def ignore_stop_signals() -> None:
    """From here on, signals that would end or stop this process do nothing: those of a terminal, or
    to all processes of a job, are for the trainer. Child processes get the default handlers."""
    left = {getattr(signal, f"SIG{name}", None) for name in _FAULTS}
    for number in signal.valid_signals() - left:
        if signal.getsignal(number) == signal.SIG_DFL or number == signal.SIGINT:
            signal.signal(number, lambda *_: None)


class Process:
    """started: start time in clock ticks since boot, or 0 if unknown. ended: whether only its
    status is left, which nobody has collected."""

    __slots__ = ("pid", "parent", "group", "started", "ended")

    def __init__(self, pid: int, parent: int, group: int, started: int, ended: bool):
        self.pid, self.parent, self.group, self.started = pid, parent, group, started
        self.ended = ended


def adopt_orphans(yes: bool = True) -> None:
    """From here on, this process adopts the orphans among its descendants (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(yes))


def end_with_parent() -> None:
    """Have this process killed when its parent ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(root: int) -> list[int]:
    """All processes below `root`, parents first."""
    return [process.pid for process in below({root}, processes())]


def below(
    roots: Collection[int], table: Iterable[Process], spared: Collection[int] = ()
) -> list[Process]:
    """All processes of a table below `roots`, parents first, without `spared` and those below."""
    children: dict[int, list[Process]] = {}
    for process in table:
        if process.pid not in spared:
            children.setdefault(process.parent, []).append(process)
    found = [child for root in roots for child in children.get(root, [])]
    for process in found:  # grows while it is read
        found += children.get(process.pid, [])
    return found


def start_times_below(root: int, spared: Collection[int] = ()) -> dict[int, int]:
    """Start time of each process below `root`, by its pid, which another may get later."""
    return {each.pid: each.started for each in below({root}, processes(), spared)}


def still_running(known: dict[int, int]) -> set[int]:
    """The pids of `start_times_below` that still exist."""
    return {each.pid for each in processes() if known.get(each.pid) == each.started}


def kill_below(
    root: int, reap: Callable[[list[int]], None], seconds: float, spared: Collection[int] = ()
) -> bool:
    """Kill all descendants of `root` until none is left; returns whether `seconds` were enough.

    Processes of other users, which cannot be killed, are left out. reap: called with the pids that
    were killed; it collects their statuses, as they exist until then.
    """
    return kill_until_gone(lambda: below({root}, processes(), spared), reap, seconds)


def kill_until_gone(
    find: Callable[[], list[Process]], reap: Callable[[list[int]], None], seconds: float
) -> bool:
    """As `kill_below`, for the processes that `find` returns."""
    deadline, pause = time.monotonic() + seconds, _PAUSE
    while True:
        found = find()
        pids = {process.pid for process in found}
        # Whole groups at once where they lead one: faster than processes that fork all the time.
        groups = {process.group for process in found} & pids
        left = [_kill(os.killpg, group) for group in groups]
        left += [_kill(os.kill, pid) for pid in pids]
        reap([process.pid for process in found])
        if not any(left):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _MOST_PAUSE)


def reap_each(pids: list[int]) -> None:
    """Collect the statuses of the pids that are children of this process."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


def reap_adopted() -> None:
    """Collect the statuses of orphans that this process has adopted and that have ended.

    Not of those that it may have started itself, as other code may wait for them: a child whose
    session is neither ours nor its own must have had another parent.
    """
    try:
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
    except ChildProcessError:
        return
    own = os.getpid()
    for process in processes():
        if process.parent == own and process.ended:
            try:
                if os.getsid(process.pid) not in (os.getsid(0), process.pid):
                    reap_each([process.pid])
            except ProcessLookupError:
                continue


def self_ending(parent: int) -> set[int]:
    """Children of `parent` that clean up and end when it does: guards, and helper processes of
    Python and torch."""
    return {
        process.pid
        for process in processes()
        if process.parent == parent and any(part in _command(process.pid) for part in _OURS)
    }


def _command(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _kill(send: Callable[[int, int], None], pid: int) -> bool:
    """Whether there was a process to kill."""
    try:
        send(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def processes() -> list[Process]:
    """Every process that can be seen."""
    if not os.path.exists("/proc/self/stat"):
        # macOS and the BSDs. Imported here, as imports delay the start of a guard.
        import subprocess

        command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "pgid=", "-o", "stat="]
        try:
            listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        except OSError:  # no ps
            return []
        rows = [line.split() for line in listed]
        return [Process(*map(int, row[:3]), 0, row[3].startswith("Z")) for row in rows]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # "pid (name) state ppid pgrp ...": a name may hold spaces and brackets.
                    state, parent, group, *rest = file.read().rpartition(b")")[2].split()
            except (OSError, ValueError):
                continue  # it ended meanwhile
            found.append(
                Process(int(entry), int(parent), int(group), int(rest[16]), state in b"ZX")
            )
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
