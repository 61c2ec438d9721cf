"""Seconds per phase of a step."""

import time
from contextlib import contextmanager


class Timers:
    """Seconds per phase of a step, as `timing/<phase>`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            name = f"timing/{phase}"
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds
