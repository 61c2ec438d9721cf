"""Processes that user code starts in the trainer's own process end with the run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from RL2.runtime import process_tree, watcher

_SECONDS = 10.0  # that killed processes may take to end


@contextmanager
def children_end(watch: bool) -> Iterator[None]:
    """When the body ends, kill all processes that it has left behind, except our guards, which end
    by themselves.

    watch: whether to do so even if this process is killed.
    """
    own = os.getpid()
    before = process_tree.start_times_below(own)  # left alone
    process_tree.adopt_orphans()
    watching = _watch(before) if watch else None
    try:
        yield
    finally:
        if os.getpid() == own:  # not in a fork of it
            spared = process_tree.still_running(before) | process_tree.self_ending(own)
            process_tree.kill_below(own, process_tree.reap_each, _SECONDS, spared)
            process_tree.adopt_orphans(False)
            if watching is not None:
                watching.kill()
                watching.communicate()


def _watch(before: dict[int, int]) -> subprocess.Popen:
    known = [f"{pid}:{started}" for pid, started in before.items()]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", watcher.__file__, str(os.getpid()), *known],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
