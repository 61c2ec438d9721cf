"""Where metrics go: `metrics.jsonl` always, wandb when asked, one line a step to the terminal."""

import json
import logging
import math
import os
import secrets
import string
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from RL2.runtime import guard
from RL2.runtime.folders import exists
from RL2.runtime.secrets import redact, redact_config
from RL2.trainer.sinks import wandb_process

logger = logging.getLogger(__name__)

_SUMMARY = (
    "test/score", "train/score", "actor/loss", "actor/entropy", "train/avg_response_length",
    "actor/grad_norm", "actor/skipped", "actor/nonfinite", "timing/step",
)  # fmt: skip
_ONLY_IF_NOT_ZERO = ("actor/skipped", "actor/nonfinite")

# Seconds that wandb gets for what it has not sent yet when a run ends; one that was stopped may be
# killed after thirty.
_FINISH, _FINISH_BAD = 60.0, 10.0
_STOP_GRACE = 15.0  # seconds for the guard, which kills after three of its own
_RUN_ID = 8  # characters, as wandb's own


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


class Clock:
    """How long a run goes on since it was started, or resumed, and how long it will.

    step: the last one that was done before.
    """

    def __init__(self, step: int):
        self.start = time.monotonic()
        self._from = step, self.start

    def tick(self, step: int, n_steps: int) -> str:
        """What the line of a step says of time; the steps to come are taken to be like those since
        the start, without the evaluation before them."""
        now = time.monotonic()
        said = f"elapsed {hours(now - self.start)}"
        first, since = self._from
        if step <= first:
            self._from = step, now
        elif step < n_steps:
            said += f"  left {hours((now - since) / (step - first) * (n_steps - step))}"
        return said


def hours(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


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
        self.file = self.path.open("a+")
        self.wandb = Wandb(config, run_id, self.path) if config.trainer.use_wandb else None
        self.clock = Clock(resumed_step)
        self.left_out: set[str] = set()  # metrics that were not finite once

    @property
    def run_id(self) -> str | None:
        return self.wandb.run_id if self.wandb else None

    def log(self, step: int, n_steps: int, metrics: dict[str, float]) -> None:
        self._keep_there()
        row = self._row(step, metrics)
        self.file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.poke()
        shown = [
            f"{name} {metrics[name]:.4g}"
            for name in _SUMMARY
            if name in metrics and (metrics[name] or name not in _ONLY_IF_NOT_ZERO)
        ]
        shown.append(self.clock.tick(step, n_steps))
        logger.info("step %d/%d  %s", step, n_steps, "  ".join(shown))

    def _row(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Without those that are not finite, of each of which one line is said: JSON has no such
        numbers, and Python's NaN ends jq and others."""
        left_out = {name for name, value in metrics.items() if not math.isfinite(value)}
        for name in sorted(left_out - self.left_out):
            logger.warning(
                "%s is %s in step %d, which JSON cannot hold: left out of %s, now and later",
                name, metrics[name], step, self.path.name,
            )  # fmt: skip
        self.left_out |= left_out
        return {name: value for name, value in metrics.items() if name not in left_out}

    def _keep_there(self) -> None:
        """Somebody may delete or move the file, or its folder; it is still open here."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                return
            text = ""  # another one is there
        except (FileNotFoundError, NotADirectoryError):
            self.file.seek(0)
            text = self.file.read()
        except OSError:  # nobody knows; writing to it shows
            return
        logger.warning("%s was deleted, moved or replaced; it is written there again", self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.open("a+")
        new.write(text)
        self.file, old = new, self.file
        old.close()

    def close(self, good: bool = True) -> None:
        """good: whether the run came to its end."""
        try:
            self.file.close()
        except OSError:
            pass  # a row for which there was no room, which `log` has told
        if self.wandb:
            self.wandb.close(good)


class Wandb:
    """A wandb run that follows `metrics.jsonl` in a process of its own (`wandb_process`).

    No call waits for it but `close`, and that for a minute at most. What goes wrong there is
    said once, and then it is left alone: the file has everything.

    Args:
        config: the whole run's config.
        run_id: the run to continue; None begins one.
        path: of `metrics.jsonl`; what stands in it already is not sent.
    """

    def __init__(self, config: DictConfig, run_id: str | None, path: Path):
        # Made here, so that the first checkpoint knows it, whether wandb answers or not.
        self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or _new_run_id()
        self.path, self.given_up = path, False
        self._process = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(os.getpid()),
             sys.executable, "-P", wandb_process.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer
        )  # fmt: skip
        order = {
            "settings": {
                "project": redact(config.trainer.project),
                "name": redact(config.trainer.experiment_name),
                "config": redact_config(OmegaConf.to_container(config, resolve=True)),
                "dir": config.trainer.save_dir,
                "id": self.run_id,
                "resume": "allow" if run_id else None,
            },
            "trainer": os.getpid(),
            "program": sys.argv[0],
            "metrics": str(path),
            "offset": path.stat().st_size,
        }
        self._send(json.dumps(order).encode() + b"\n")
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)

    def poke(self) -> None:
        """The file has grown. Passes on what wandb has to say."""
        self._send(wandb_process.GROWN)
        self._pass_on()

    def close(self, good: bool) -> None:
        """Have it send the rest and end, or end it. good: whether the run came to its end."""
        self._send(wandb_process.GOOD if good else wandb_process.BAD)
        process, seconds = self._process, _FINISH if good else _FINISH_BAD
        process.stdin.close()
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # the guard ends all that wandb has started
            try:
                process.wait(_STOP_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            status = None
        self._pass_on()
        process.stdout.close()
        if status is None:
            self._warn(f"was not done {seconds:g} s after the run and was ended")
        elif status not in (0, wandb_process.TOLD):
            self._warn(f"its process ended with status {status}")

    def _send(self, words: bytes) -> None:
        try:
            os.write(self._process.stdin.fileno(), words)
        except BlockingIOError:
            pass  # it has been poked thousands of times, and looks at the file when it can
        except BrokenPipeError:
            if self._process.poll() not in (None, wandb_process.TOLD):
                self._warn(f"its process ended with status {self._process.returncode}")

    def _pass_on(self) -> None:
        for line in (self._process.stdout.read() or b"").decode(errors="replace").splitlines():
            logger.warning("wandb: %s", line)

    def _warn(self, what: str) -> None:
        """Say once that there is nothing more to expect."""
        if not self.given_up:
            logger.warning(
                "wandb: %s; %s has every step (`wandb sync` sends what lies under %s)",
                what,
                self.path,
                self.path.parent / "wandb",
            )
        self.given_up = True


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of `metrics.jsonl` up to a step; a killed process may have left half of one."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if exists(path) else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, LookupError, TypeError):
            logger.warning("%s: a line that is no step's was dropped: %.80s", path, line)
    return kept


def _new_run_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(_RUN_ID))
