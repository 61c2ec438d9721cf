"""A small process between the trainer and one that must not outlive it: a server, an environment, a
tracker.

    python guard.py <pid of the trainer> [--control=<number>,…] <command> ...

A trainer that is killed cannot clean up after itself, and what it starts has its own children, in
whatever session they run. The guard ends all of them when the trainer is gone, when it is told to,
or when the process itself ends. Whoever waits for the guard waits for all of them.

Without `--control` it is told by SIGTERM: it asks first and kills what is still there some seconds
later. Its exit status is 0, or that of a process that ended by itself (128 + the signal's number).

With `--control` it is told by what comes on its standard input, or the end of that, and kills at
once. It ends as the process has ended: by the same signal, or with the same status. It closes the
numbered files, which are for the process alone.

Where the trainer is gone it removes the trainer's copy of the weights as well, which may lie in
memory. It needs nothing but the standard library, and of that little, as each process waits for its
guard. It knows children that other children left behind on Linux only.
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
_KILLED = 60.0  # seconds that killed processes may take to be gone, where a disk keeps them
_POLL = 0.5  # seconds; the end of the input says it at once, unless a fork of the trainer has it
_OPTION = "--control="


class Child:
    """The guarded process. status: as os.waitpid has it, None while it runs."""

    def __init__(self, command: list[str], stdin: int | None):
        guard = os.getpid()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()  # Ctrl-C in the trainer's terminal is for the trainer
            process_tree.end_with_parent()  # should the guard be killed itself
            if os.getppid() != guard:
                os._exit(1)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
                signal.signal(number, signal.SIG_DFL)
            if stdin is not None:
                os.dup2(stdin, 0)
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def collect(self) -> int | None:
        """Its status, with those of orphans that have ended, so that they do not count as alive."""
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.pid:
                    self.status = found[1]
        except ChildProcessError:
            pass
        return self.status

    def ask(self) -> None:
        """Let it end its own children, which it knows best, and those end themselves."""
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
            except ProcessLookupError:  # it has just begun
                os.kill(self.pid, signal.SIGKILL)
        process_tree.kill_below(os.getpid(), lambda pids: self.collect(), _KILLED)
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]


def main(trainer: int, command: list[str]) -> int | None:
    """The status of the process; None where it was ended by being asked to."""
    control = command[0].startswith(_OPTION)
    files = command.pop(0).removeprefix(_OPTION).split(",") if control else []
    told = []
    wakes, wake = os.pipe()
    for end in (wakes, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    process_tree.heed_no_signals()
    signal.signal(signal.SIGCHLD, lambda *_: None)  # which wakes us
    for number in () if control else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: told.append(True))
    process_tree.adopt_orphans()
    child = Child(command, os.open(os.devnull, os.O_RDONLY) if control else None)
    for file in filter(None, files):
        os.close(int(file))  # the trainer sees by them whether the process is there
    if control:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # and a reader, whether the run is
    while not told and child.collect() is None and os.getppid() == trainer:
        ready = select.select([wakes, 0] if control else [wakes], [], [], _POLL)[0]
        if wakes in ready:
            os.read(wakes, 512)
        if 0 in ready:
            told.append(True)
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
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # there is one of the process itself
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _exit(main(int(sys.argv[1]), sys.argv[2:]), sys.argv[2].startswith(_OPTION))
