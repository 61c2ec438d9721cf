"""A small process between the trainer and a process that must not outlive it: a server, an
environment or a tracker.

    python guard.py <pid of the trainer> [--control=<number>,…] <command> ...

A killed trainer cannot clean up, and the processes that it started have children of their own,
possibly in other sessions. The guard ends all of them when the trainer is gone, on request, or when
the guarded process itself ends. To wait for the guard is to wait for all of them.

Without `--control` the request is SIGTERM: the guard sends SIGTERM, and kills what is left some
seconds later. Its exit status is 0, or that of a process that ended by itself (128 + the signal's
number).

With `--control` the request is any input on stdin, or its end, and the guard kills at once. It ends
like the guarded process: by the same signal, or with the same status. It closes the numbered files,
which are for the guarded process only.

When the trainer is gone, the guard also removes the trainer's copy of the weights, which may be in
shared memory. It uses little of the standard library and nothing else, as each process waits for
its guard. Orphans of child processes are found on Linux only.
"""

import os
import resource
import select
import signal
import sys
import time

if __package__:
    from RL2.runtime import process_tree
else:  # it is run by its path, alone
    sys.path.append(os.path.dirname(__file__))
    import process_tree

_GRACE = 3.0  # seconds between asking and killing
_KILLED = 60.0  # seconds that killed processes may take to end, e.g. while they wait for a disk
_POLL = 0.5  # seconds; stdin ends at once with the trainer, unless a fork of it holds the pipe
_OPTION = "--control="


class Child:
    """The guarded process. status: as from os.waitpid, None while it runs."""

    def __init__(self, command: list[str], stdin: int | None):
        guard = os.getpid()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()  # Ctrl-C in the trainer's terminal is for the trainer
            process_tree.end_with_parent()  # in case the guard is killed
            if os.getppid() != guard:
                os._exit(1)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these
                signal.signal(number, signal.SIG_DFL)
            if stdin is not None:
                os.dup2(stdin, 0)
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def collect(self) -> int | None:
        """Its status. Also collects those of ended orphans, so that they do not count as alive."""
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.pid:
                    self.status = found[1]
        except ChildProcessError:
            pass
        return self.status

    def ask(self) -> None:
        """Send SIGTERM and give it and its children some seconds to end."""
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            if self.collect() is not None and not process_tree.descendants(os.getpid()):
                return
            time.sleep(_POLL / 10)

    def kill(self) -> None:
        """Kill it and all that it has started."""
        if self.status is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                os.kill(self.pid, signal.SIGKILL)
        process_tree.kill_below(os.getpid(), lambda pids: self.collect(), _KILLED)
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]


def main(trainer: int, command: list[str]) -> int | None:
    """The status of the process; None if it ended on request."""
    control = command[0].startswith(_OPTION)
    files = command.pop(0).removeprefix(_OPTION).split(",") if control else []
    requests = []
    wakes, wake = os.pipe()
    for end in (wakes, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    process_tree.ignore_stop_signals()
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake up
    for number in () if control else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: requests.append(True))
    process_tree.adopt_orphans()
    child = Child(command, os.open(os.devnull, os.O_RDONLY) if control else None)
    for file in filter(None, files):
        os.close(int(file))  # so that they close with the process, which tells the trainer
    if control:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the same for a reader of the run's output
    while not requests and child.collect() is None and os.getppid() == trainer:
        ready = select.select([wakes, 0] if control else [wakes], [], [], _POLL)[0]
        if wakes in ready:
            os.read(wakes, 512)
        if 0 in ready:
            requests.append(True)
    by_itself = child.status
    if not control:
        child.ask()
    child.kill()
    if os.getppid() != trainer:
        _remove_weights(trainer)
    return child.status if control else by_itself


def _remove_weights(trainer: int) -> None:
    import glob
    import shutil
    import tempfile

    for parent in ("/dev/shm", tempfile.gettempdir()):
        for folder in glob.glob(f"{parent}/rl2-weights-{trainer}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _exit(status: int | None, as_it_did: bool) -> None:
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0 and as_it_did:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the process has its own core dump
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _exit(main(int(sys.argv[1]), sys.argv[2:]), sys.argv[2].startswith(_OPTION))
