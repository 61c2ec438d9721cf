"""The interface of sinks, which receive the rows of `metrics.jsonl`."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """What a sink knows about a run.

    project, name: `trainer.project` and `trainer.experiment_name`.
    config: the config of the whole run, resolved, without secrets.
    folder: the run's folder (`trainer.save_dir`).
    id: the run's id, which a resumed run keeps.
    resumed: whether the run was resumed.
    resumed_step: the last step logged before. A run that was killed may have logged later ones,
        which come again.
    pid, program: the trainer's process id and program.
    """

    project: str
    name: str
    config: dict[str, Any]
    folder: str
    id: str
    resumed: bool
    resumed_step: int
    pid: int
    program: str


class Sink(Protocol):
    """Takes the rows of a run, in order. A new one is a module with such a class and a line in
    `SINKS` (`RL2.trainer.sinks.registry`); `trainer.trackers` then takes its name.

    Every sink but jsonl runs in a process of its own, which reads `metrics.jsonl`. It may be slow,
    and its errors end only that process. It imports its package in its methods, as the trainer
    imports the class as well. `tell` passes a line on to the user.

    module: the package that it needs, as Python imports it. install: the package's name for pip.
    afterwards: how to send rows that were not sent, for a sink that keeps them in the folder.
    """

    module: ClassVar[str]
    install: ClassVar[str]
    afterwards: ClassVar[str]

    def __init__(self, run: TrackedRun, tell: Callable[[str], None]): ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take a row, with the names of `metrics.jsonl`."""

    def close(self, good: bool) -> None:
        """Send what is left. good: whether the run came to its end."""
