"""What a sink is: somewhere that the rows of `metrics.jsonl` go."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """What a sink is told of a run.

    project, name: `trainer.project` and `trainer.experiment_name`.
    config: the whole run's, resolved, without secrets.
    folder: the run's (`trainer.save_dir`).
    id: the same when a run goes on from a checkpoint, another one when it starts anew.
    resumed: whether it goes on. resumed_step: the last step that was logged before. A run that was
        killed may have logged later ones; they come again.
    pid, program: of the trainer.
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

    Every sink but jsonl lives in a process of its own, which reads `metrics.jsonl`: it may take its
    time, and whatever it raises ends that process and nothing else. Its package is imported in its
    methods, as the trainer imports this class, too. `tell` passes a line on to the user.

    module: what has to be installed, as Python imports it. install: as pip knows it.
    afterwards: what can be done with what was not sent, for a sink that leaves it in the folder.
    """

    module: ClassVar[str]
    install: ClassVar[str]
    afterwards: ClassVar[str]

    def __init__(self, run: TrackedRun, tell: Callable[[str], None]): ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take a row, by the names of `metrics.jsonl`."""

    def close(self, good: bool) -> None:
        """Send what is left. good: whether the run came to its end."""
