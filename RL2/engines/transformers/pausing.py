"""Pausing the thread that runs the model."""

from __future__ import annotations

import threading
from collections.abc import Callable


class PauseSwitch:
    """Lets the worker thread run the model, or not: pause, and the wait until it has paused."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.paused = self._running = False

    def set_paused(self, paused: bool) -> None:
        with self._changed:
            self.paused = paused
            self._changed.notify_all()

    def poke(self) -> None:
        """Have `begin` look again whether its work is still wanted."""
        with self._changed:
            self._changed.notify_all()

    def begin(self, unwanted: Callable[[], bool]) -> bool:
        """Worker: wait while paused. False where the work has become unwanted."""
        with self._changed:
            self._changed.wait_for(lambda: not self.paused or unwanted())
            self._running = not unwanted()
            return self._running

    def end(self) -> None:
        """Worker: the model does not run any more."""
        with self._changed:
            self._running = False
            self._changed.notify_all()

    def wait_until_still(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._running or not self.paused)
