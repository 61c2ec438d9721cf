"""Pausing the thread that runs the model."""

from __future__ import annotations

import threading
from collections.abc import Callable


class PauseSwitch:
    """Lets other threads pause the worker thread and wait until it has paused."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.paused = self._running = False

    def set_paused(self, paused: bool) -> None:
        with self._changed:
            self.paused = paused
            self._changed.notify_all()

    def poke(self) -> None:
        """Have `begin` check again whether its work is still wanted."""
        with self._changed:
            self._changed.notify_all()

    def begin(self, unwanted: Callable[[], bool]) -> bool:
        """Worker: wait while paused. Returns False if the work is no longer wanted."""
        with self._changed:
            self._changed.wait_for(lambda: not self.paused or unwanted())
            self._running = not unwanted()
            return self._running

    def end(self) -> None:
        """Worker: the model has stopped running."""
        with self._changed:
            self._running = False
            self._changed.notify_all()

    def wait_until_still(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._running or not self.paused)
