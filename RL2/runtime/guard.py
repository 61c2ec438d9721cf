"""A small process between the trainer and a server that leaves nothing behind.

    python guard.py <pid of the trainer> <command of the server> ...

A trainer that is killed cannot clean up after itself, and a server has children of its own. The
guard ends all of them when the trainer is gone, when it is told to (SIGTERM), or when the server
itself ends, and then exits with the server's status. Where the trainer is gone it removes the
trainer's copy of the weights as well, which may lie in memory. It needs nothing but the standard
library, and knows children that other children left behind on Linux only.
"""

import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

if __package__:
    from RL2.runtime import process_tree
else:  # it is run by its path, alone
    sys.path.append(os.path.dirname(__file__))
    import process_tree

_GRACE = 3.0  # seconds between asking and killing
_KILLED = 5.0  # seconds that killed processes may take to be gone
_POLL = 0.2


def _reap() -> None:
    """Collect children that were left to us, so that they do not count as alive."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _end(server: subprocess.Popen) -> None:
    # The server first, alone: it knows how to end its own children, and what to clean up.
    if server.poll() is None:
        server.terminate()
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline:
        server.poll()
        _reap()
        if server.returncode is not None and not process_tree.descendants(os.getpid()):
            return
        time.sleep(_POLL / 4)

    def reap(pids: list[int]) -> None:
        server.poll()
        process_tree.reap_each([pid for pid in pids if pid != server.pid])

    server.kill()
    process_tree.kill_below(os.getpid(), reap, _KILLED)
    server.poll()


def main(trainer: int, command: list[str]) -> int:
    asked = []
    process_tree.heed_no_signals()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append(True))
    process_tree.adopt_orphans()
    # A session of its own: Ctrl-C in the trainer's terminal is for the trainer. Should the guard
    # itself be killed, the server goes with it.
    server = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=process_tree.end_with_parent,
    )
    while server.poll() is None and os.getppid() == trainer and not asked:
        time.sleep(_POLL)
    status = server.poll()
    _end(server)
    if os.getppid() != trainer:
        for parent in ("/dev/shm", tempfile.gettempdir()):
            for folder in glob.glob(f"{parent}/rl2-weights-{trainer}-*"):
                shutil.rmtree(folder, ignore_errors=True)
    if status is None:
        return 0
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
