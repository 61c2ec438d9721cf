"""A small process between the trainer and a process that runs an environment.

    python env_guard.py <pid of the trainer>

It reads from its standard input, each with a zero byte behind it, the numbers of the files that are
passed on, the words of the command to start, and nothing, which ends them. When more comes there or
it ends, when the trainer is gone, or when the process itself ends, it kills that and all that it
has started, in whatever session that runs, and ends as the process has ended: by the same signal,
or with the same status. Whoever waits for the guard waits for all of them.
"""

import os
import resource
import select
import signal
import sys

if __package__:
    from RL2.runtime import process_tree
else:  # it is run by its path, alone
    sys.path.append(os.path.dirname(__file__))
    import process_tree

_END = b"\0\0"
_POLL = 1.0  # seconds; the end of the input says it at once, unless a fork of the trainer has it
_KILLED = 60.0  # seconds that killed processes may take to be gone, where a disk keeps them


def main(trainer: int) -> int:
    """The status of the process, as os.waitpid has it."""
    wakes, wake = os.pipe()
    for end in (wakes, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    process_tree.heed_no_signals()
    signal.signal(signal.SIGCHLD, lambda *_: None)  # which wakes us
    process_tree.adopt_orphans()
    order = b""
    while _END not in order:
        if os.getppid() != trainer:
            return 0
        if select.select([0], [], [], _POLL)[0]:
            data = os.read(0, 65536)
            if not data:
                return 0
            order += data
    order, more = order.split(_END, 1)
    files, *command = order.split(b"\0")
    child = _start(command)
    for number in files.split():
        os.close(int(number))  # the trainer sees by them whether the process is there
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # and a reader, whether the run is
    status = None
    while status is None and not more and os.getppid() == trainer:
        if wakes in (ready := select.select([0, wakes], [], [], _POLL)[0]):
            os.read(wakes, 512)
        status = _collect(child)
        more = 0 in ready
    statuses = [status] if status is not None else []

    def reap(pids: list[int]) -> None:
        found = _collect(child) if not statuses else None
        statuses.extend([] if found is None else [found])
        process_tree.reap_each([pid for pid in pids if pid != child])

    if status is None:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # it has just begun
            os.kill(child, signal.SIGKILL)
    process_tree.kill_below(os.getpid(), reap, _KILLED)
    return statuses[0] if statuses else os.waitpid(child, 0)[1]


def _start(command: list[bytes]) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        process_tree.end_with_parent()  # should the guard be killed itself
        if os.getppid() != guard:
            os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execv(command[0], command)
    finally:
        os._exit(127)


def _collect(child: int) -> int | None:
    """Collect whoever has ended; the status of `child`, once."""
    status = None
    try:
        while True:
            pid, found = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return status
            if pid == child:
                status = found
    except ChildProcessError:
        return status


if __name__ == "__main__":
    code = os.waitstatus_to_exitcode(main(int(sys.argv[1])))
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # there is one of the process itself
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
