"""Where metrics go: `metrics.jsonl` always, wandb when asked, one line a step to the terminal."""

import json
import logging
import os
import time
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

_SUMMARY = {
    "test/score": "test",
    "train/score": "train",
    "actor/loss": "loss",
    "actor/entropy": "entropy",
    "train/avg_response_length": "length",
    "actor/grad_norm": "grad",
    "actor/skipped": "skipped",
    "actor/nonfinite": "non-finite",
    "timing/step": "s",
}
_ONLY_IF_NOT_ZERO = ("actor/skipped", "actor/nonfinite")


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


class Metrics:
    """Rank 0's sinks.

    Args:
        config: the whole run's config (logged to wandb).
        resumed_step: lines of `metrics.jsonl` beyond it are dropped: a resumed run writes those
            steps again, and the file holds every step once.
        run_id: the wandb run to continue, if any.
    """

    def __init__(self, config: DictConfig, resumed_step: int, run_id: str | None):
        self.path = Path(config.trainer.save_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(self.path, resumed_step)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.path)
        self.file = self.path.open("a")
        self.run = _start_wandb(config, run_id) if config.trainer.use_wandb else None

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run else None

    def log(self, step: int, n_steps: int, metrics: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.run:
            self.run.log(metrics, step=step)
        shown = [
            f"{label} {metrics[name]:.4g}"
            for name, label in _SUMMARY.items()
            if name in metrics and (metrics[name] or name not in _ONLY_IF_NOT_ZERO)
        ]
        logger.info("step %d/%d  %s", step, n_steps, "  ".join(shown))

    def close(self) -> None:
        self.file.close()
        if self.run:
            self.run.finish()


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of `metrics.jsonl` up to a step; a killed process may have left half of one."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            logger.warning("%s: a line that is not JSON was dropped: %.80s", path, line)
    return kept


def _start_wandb(config: DictConfig, run_id: str | None):
    """Start a wandb run; without a key or a reachable server it is an offline one, said once."""
    import wandb

    settings = {
        "project": config.trainer.project,
        "name": config.trainer.experiment_name,
        "config": OmegaConf.to_container(config, resolve=True),
        "dir": config.trainer.save_dir,
        "id": run_id,
        "resume": "allow" if run_id else None,
    }
    timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))
    quiet = wandb.Settings(silent=True, console="off", init_timeout=timeout)
    mode = os.environ.get("WANDB_MODE")
    try:
        # Without a key, init would ask for one on a terminal.
        if mode is not None or wandb.login(prompt=False):
            return wandb.init(**settings, mode=mode, settings=quiet)
        problem = "no API key"
    except (wandb.errors.Error, ValueError, OSError) as error:
        problem = str(error).strip().partition("\n")[0]
    logger.warning(
        "wandb: %s; logging offline under %s (`wandb login`, or trainer.use_wandb=false)",
        problem,
        config.trainer.save_dir,
    )
    return wandb.init(**settings, mode="offline", settings=quiet)
