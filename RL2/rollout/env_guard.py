"""A small process that ends the environments of a trainer which is gone.

    python env_guard.py <pid of the trainer>

Environments run in process groups of their own, which a trainer that is killed cannot end. The
guard is told about them over its standard input, one a line: `+12` is there, `-12` is not any more.
When the trainer is gone, it kills those that are left, with all that they have started. It needs
nothing but the standard library.
"""

import os
import select
import signal
import sys

_POLL = 1.0  # seconds; the end of the input says it at once, unless a fork of the trainer has it


def main(trainer: int) -> None:
    # Signals from a terminal, or for all processes of a job, are for the trainer.
    for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR"):
        if number := getattr(signal, f"SIG{name}", None):
            signal.signal(number, signal.SIG_IGN)
    groups, text = set(), b""
    while os.getppid() == trainer:
        if not select.select([0], [], [], _POLL)[0]:
            continue
        data = os.read(0, 65536)
        if not data:
            break
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it ended by itself


if __name__ == "__main__":
    main(int(sys.argv[1]))
