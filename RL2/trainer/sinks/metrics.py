"""Where metrics go: `metrics.jsonl` always, trackers if asked, a line per step to the terminal."""

import logging
import os
import secrets
import string
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from RL2.config.trackers import trackers_of
from RL2.runtime.secrets import redact, redact_config
from RL2.trainer.sinks.jsonl import Jsonl
from RL2.trainer.sinks.process import SinkProcess
from RL2.trainer.sinks.registry import SINKS
from RL2.trainer.sinks.sink import TrackedRun
from RL2.trainer.sinks.terminal import Clock, summary

logger = logging.getLogger(__name__)

# Seconds that trackers get to send the rest when a run ends. A run that was stopped may be killed
# after thirty.
_FINISH, _FINISH_BAD = 60.0, 10.0
_RUN_ID = 8  # characters, as wandb's own


class Metrics:
    """Rank 0's sinks.

    Args:
        config: the config of the whole run.
        resumed_step: the last step done before.
        run_id: the id by which all trackers find a resumed run; None begins a new one.
    """

    def __init__(self, config: DictConfig, resumed_step: int, run_id: str | None):
        resumed = run_id is not None
        trackers = trackers_of(config.trainer)
        if run_id is None and trackers:
            # Made here, so that the first checkpoint has it even if no tracker answers.
            run_id = os.environ.get("WANDB_RUN_ID") or _new_run_id()
        self.run_id = run_id
        run = TrackedRun(
            project=redact(config.trainer.project),
            name=redact(config.trainer.experiment_name),
            config=redact_config(OmegaConf.to_container(config, resolve=True)),
            folder=config.trainer.save_dir,
            id=run_id or "",
            resumed=resumed,
            resumed_step=resumed_step,
            pid=os.getpid(),
            program=sys.argv[0],
        )
        self.jsonl = Jsonl(run, logger.warning)
        self.trackers = [SinkProcess(name, SINKS[name], run, self.path) for name in trackers]
        self.clock = Clock(resumed_step)

    @property
    def path(self) -> Path:
        return self.jsonl.path

    def log(self, step: int, n_steps: int, metrics: dict[str, float]) -> None:
        """Log a step. Raises OSError if `metrics.jsonl` cannot be written."""
        self.jsonl.log(step, metrics)
        for tracker in self.trackers:
            tracker.notify()
        shown = (summary(metrics), self.clock.tick(step, n_steps))
        logger.info("step %d/%d  %s", step, n_steps, "  ".join(filter(None, shown)))

    def close(self, good: bool = True) -> None:
        """Close all sinks. good: whether the run came to its end."""
        self.jsonl.close(good)
        for tracker in self.trackers:
            tracker.finish(good)
        seconds = _FINISH if good else _FINISH_BAD
        deadline = time.monotonic() + seconds
        for tracker in self.trackers:
            tracker.wait(deadline, seconds)


def _new_run_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(_RUN_ID))
