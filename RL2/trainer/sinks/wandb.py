"""Rows of metrics to Weights & Biases."""

import os
from collections.abc import Callable

from RL2.trainer.sinks.sink import TrackedRun


class Wandb:
    """Runs of Weights & Biases, offline without a key or network.

    wandb drops steps that come again.
    """

    module = install = "wandb"
    afterwards = "`wandb sync` sends what is in its folder wandb"

    def __init__(self, run: TrackedRun, tell: Callable[[str], None]):
        import wandb

        settings = {
            "project": run.project, "name": run.name, "config": run.config, "dir": run.folder,
            "id": run.id, "resume": "allow" if run.resumed else None,
        }  # fmt: skip
        quiet = wandb.Settings(
            silent=True, console="off", program=run.program, x_stats_pid=run.pid,
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", "30")),
        )  # fmt: skip
        mode = os.environ.get("WANDB_MODE")
        try:
            # Without a key, init would ask for one on a terminal.
            if mode is not None or wandb.login(prompt=False):
                self._run = wandb.init(**settings, mode=mode, settings=quiet)
                return
            problem = "no API key"
        except (wandb.errors.Error, ValueError, OSError) as error:
            problem = str(error).strip().partition("\n")[0] or type(error).__name__
        wandb.teardown()  # a service that still tries would say that the run's id is in use
        self._run = wandb.init(**settings, mode="offline", settings=quiet)
        tell(
            f"{problem}; logging offline under {run.folder} (`wandb login`, or "
            "trainer.use_wandb=false)"
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self, good: bool) -> None:
        self._run.finish(exit_code=int(not good))
