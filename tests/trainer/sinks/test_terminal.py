"""The line of a step: what it shows of time."""

import time

from RL2.trainer.sinks.terminal import Clock, hours


def test_time_gone_and_left(monkeypatch):
    """What is left is told by the steps since the start, without the evaluation before them."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(0)
    now[0] += 600
    assert clock.tick(0, 10) == "elapsed 0:10:00"
    now[0] += 60
    assert clock.tick(1, 10) == "elapsed 0:11:00  left 0:09:00"
    now[0] += 30
    assert clock.tick(2, 10) == "elapsed 0:11:30  left 0:06:00"
    assert clock.tick(10, 10) == "elapsed 0:11:30"
    resumed = Clock(20)
    now[0] += 10
    assert resumed.tick(21, 1021) == "elapsed 0:00:10  left 2:46:40"
    assert hours(100 * 3600 + 62) == "100:01:02"
