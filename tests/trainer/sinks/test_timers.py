"""Seconds per phase."""

import time

from RL2.trainer.sinks.timers import Timers


def test_timers_sum_what_runs_twice_and_start_anew():
    timers = Timers()
    for _ in range(2):
        with timers("phase"):
            time.sleep(0.01)
    assert timers.pop()["timing/phase"] >= 0.02
    assert timers.pop() == {}
