"""Rows of metrics to trackio."""

import warnings
from collections.abc import Callable

from RL2.trainer.sinks.sink import TrackedRun


class Trackio:
    """A local database that `trackio show` reads, or TRACKIO_SPACE_ID.

    trackio finds a run by its name, so the name holds the run's id. Steps that a resumed run
    repeats appear twice, with equal numbers.
    """

    module = install = "trackio"
    afterwards = ""

    def __init__(self, run: TrackedRun, tell: Callable[[str], None]):
        import trackio

        # trackio never raises for what it cannot write or send: it warns.
        warnings.showwarning = lambda message, *_: tell(str(message).partition("\n")[0])
        self._run = trackio.init(
            run.project, name=f"{run.name}-{run.id}", config=run.config, resume="allow",
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self, good: bool) -> None:
        self._run.finish()
