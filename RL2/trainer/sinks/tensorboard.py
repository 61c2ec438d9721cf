"""Rows of metrics to TensorBoard."""

import os
import time
from collections.abc import Callable

from RL2.trainer.sinks.sink import TrackedRun


class TensorBoard:
    """Event files in the folder `tensorboard` of the run.

    The config is not in them, but in `config.yaml` of the run.
    """

    module = install = "tensorboard"
    afterwards = ""

    def __init__(self, run: TrackedRun, tell: Callable[[str], None]):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(os.path.join(run.folder, "tensorboard"))
        if run.resumed:  # readers drop the steps of a killed run that come again
            start = SessionLog(status=SessionLog.START)
            self._add(run.resumed_step + 1, session_log=start)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self._add(step, summary=self._summary(value=values))
        self._writer.flush()

    def close(self, good: bool) -> None:
        self._writer.close()

    def _add(self, step: int, **what) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **what))
