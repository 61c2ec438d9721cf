"""SIGTERM and SIGINT: a run that is asked to stop saves where it stands and ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What Python does with the signals that are waited for.
_DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


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
