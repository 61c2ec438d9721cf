"""A small process that ends what user code has started in a trainer that is gone.

    python watcher.py <pid of the trainer> [<pid>:<start> of what it had started before ...]

Processes that a loss or an in-process environment starts are children of the trainer, which ends
them when it ends normally (`RL2.runtime.children`). A killed trainer cannot. The watcher lists them
every second, and kills them when the trainer is gone. Standard library only.
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

_POLL = 1.0  # seconds; stdin ends at once with the trainer, unless a fork of it holds the pipe
_KILLED = 60.0  # seconds that killed processes may take to end


def main(trainer: int, before: dict[int, int]) -> None:
    """before: processes to leave alone, listed by the trainer, as listing them here may be late."""
    process_tree.ignore_stop_signals()
    known: dict[int, int] = {}
    while os.getppid() == trainer:
        spared = process_tree.still_running(before) | process_tree.self_ending(trainer)
        known = process_tree.start_times_below(trainer, spared)
        if select.select([0], [], [], _POLL)[0] and not os.read(0, 512):
            break

    # A trainer that ends normally kills this process first.
    with contextlib.suppress(OSError):
        os.write(2, b"the trainer's process ended abruptly (os._exit, a crash or a kill)\n")

    def find() -> list[process_tree.Process]:
        """The known processes that are left, and what they have started since."""
        table = [process for process in process_tree.processes() if not process.ended]
        # Another process may have got the same pid.
        left = [process for process in table if known.get(process.pid) == process.started]
        left += process_tree.below([process.pid for process in left], table)
        known.update((process.pid, process.started) for process in left)
        return left

    process_tree.kill_until_gone(find, process_tree.reap_each, _KILLED)


if __name__ == "__main__":
    words = (word.split(":") for word in sys.argv[2:])
    main(int(sys.argv[1]), {int(pid): int(started) for pid, started in words})
