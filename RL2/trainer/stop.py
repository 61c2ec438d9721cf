"""SIGTERM, SIGINT, a launcher that is gone: the run saves where it stands and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# What Python does with the signals that are waited for.
_DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


_GRACE = 30.0  # seconds from SIGTERM to SIGKILL, as torchrun has it


class StopRequest:
    """Whether this process was asked to stop, and what shall happen at once when it is.

    number: of the signal, None as long as there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._callbacks: list[Callable[[], None]] = []

    def call(self, callback: Callable[[], None]) -> None:
        """Have something called, in the main thread between two lines, when a signal comes."""
        self._callbacks.append(callback)
        if self.number is not None:
            callback()

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """A signal's handler. The next one ends the process as if there were no handler."""
        self.number = number
        for each, handler in _DEFAULTS.items():
            signal.signal(each, handler)
        for callback in self._callbacks:
            callback()


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """A request that SIGTERM and SIGINT fill while the body runs.

    Python only lets the main thread have handlers; elsewhere the request stays empty.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in _DEFAULTS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_launcher() -> None:
    """Have this process stop, as by SIGTERM, when the torchrun that has started it is gone.

    torchrun ends its processes itself unless it is killed with -9; then they would train on, and
    nobody would see them. Without torchrun nothing happens: a run may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    there = _may_be_launcher(launcher)  # it may have been killed while Python started

    def follow() -> None:
        while there and os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)  # it hangs, as in a collective that nobody joins

    threading.Thread(target=follow, name="follow-launcher", daemon=True).start()


def _may_be_launcher(pid: int) -> bool:
    """Whether a parent is not one that has adopted us, such as init: torchrun runs in Python, and
    a script between it and us has its variables."""
    process = Path("/proc", str(pid))
    if pid == 0 or not Path("/proc/self").exists():  # in another namespace; not Linux
        return True
    try:
        if "python" in Path(os.readlink(process / "exe")).name:
            return True
        return b"TORCHELASTIC_RUN_ID=" in (process / "environ").read_bytes()
    except OSError:  # gone meanwhile, or somebody else's
        return False
