"""A small process that ends what a stranger's code has started in a trainer that is gone.

    python watcher.py <pid of the trainer> [<pid>:<start> of what it had started before ...]

A loss, or an environment that runs in the trainer itself, has the trainer for a parent, which ends
its children when it ends in order (`RL2.runtime.children`). One that is killed cannot. The watcher
looks every second who they are, and kills them when the trainer is gone. It needs nothing but the
standard library.
"""

import contextlib
import os
import select
import sys

if __package__:
    from RL2.runtime import process_tree
else:  # it is run by its path, alone
    sys.path.append(os.path.dirname(__file__))
    import process_tree

_POLL = 1.0  # seconds; the end of the input says it at once, unless a fork of the trainer has it
_KILLED = 60.0  # seconds that killed processes may take to be gone


def main(trainer: int, before: dict[int, int]) -> None:
    """before: these are none of our business. (Who looks only here may be late.)"""
    process_tree.heed_no_signals()
    known: dict[int, int] = {}
    while os.getppid() == trainer:
        spared = process_tree.still(before) | process_tree.end_themselves(trainer)
        known = process_tree.those_below(trainer, spared)
        if select.select([0], [], [], _POLL)[0] and not os.read(0, 512):
            break

    # Whoever ends in order ends us first.
    with contextlib.suppress(OSError):
        os.write(2, b"the trainer's process is gone without a word (os._exit, a crash, a kill)\n")

    def find() -> list[process_tree.Process]:
        """Those that are left, and what they have started since."""
        table = [process for process in process_tree.processes() if not process.ended]
        # Another one may have got its number.
        left = [process for process in table if known.get(process.pid) == process.started]
        left += process_tree.below([process.pid for process in left], table)
        known.update((process.pid, process.started) for process in left)
        return left

    process_tree.kill_until_gone(find, process_tree.reap_each, _KILLED)


if __name__ == "__main__":
    words = (word.split(":") for word in sys.argv[2:])
    main(int(sys.argv[1]), {int(pid): int(started) for pid, started in words})
