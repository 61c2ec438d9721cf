"""A run's state and folder: how it starts, is saved, stops, resumes and ends."""

import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import torch
from omegaconf import DictConfig
from torch import Tensor

from RL2.distributed import Traffic, broadcast, rank, sum_over_ranks, world_size
from RL2.distributed.agreement import all_or_none, on_all_ranks
from RL2.runtime.errors import CheckpointError, HealthError, Interrupted, TrainingError
from RL2.runtime.folders import cannot_write, in_the_way, lock, try_to_move
from RL2.runtime.stop import StopRequest
from RL2.trainer.checkpoints import record
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.contents import rng_state, set_rng_state
from RL2.trainer.checkpoints.export import (
    BEST,
    FilesInMemory,
    existing_best,
    fingerprint_of,
    save_model,
    value_of,
)
from RL2.trainer.health import observe
from RL2.trainer.references import Resumable
from RL2.trainer.sinks.metrics import Metrics
from RL2.trainer.sinks.timers import Timers
from RL2.trainer.sources.source import Source
from RL2.trainer.startup import machine
from RL2.trainer.startup.fingerprints import readable
from RL2.workers import Learner

logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """What the next step depends on besides the weights: position in the data, random states."""

    source: dict[str, Any]
    rng: dict[str, Tensor]


class Start(NamedTuple):
    """Where a run begins.

    step: the last step done. unfinished: its metrics, if the run was stopped after the step's
    update and before they were logged. run_id: the id that trackers know the run by; None if new.
    """

    step: int
    unfinished: dict[str, float] | None
    run_id: str | None


def claim_folder(
    config: DictConfig, device: torch.device, fingerprints: Mapping[str, str]
) -> tuple[Checkpoints, IO | None]:
    """The checkpoints of the run's folder, and the file that locks the folder while it is open.

    Also sets the number of threads, and refuses what may not differ from the run that this one
    resumes, before a model loads.
    """
    trainer = config.trainer
    checkpoints = Checkpoints(
        trainer.save_dir, trainer.keep_last, config, background=trainer.async_save
    )
    about = checkpoints.about(trainer.load_ckpt_from)
    checkpoints.threads = machine.use_threads(trainer.num_threads, about)
    checkpoints.machines = machine.all_machines(device)
    checkpoints.inputs = readable(fingerprints)
    if trainer.load_ckpt_from is not None:
        checkpoints.check(trainer.load_ckpt_from)
    return checkpoints, all_or_none(lambda: lock(trainer.save_dir) if rank() == 0 else None)


class Run:
    """The folder of a run, and the state that a resumed run continues with.

    Args:
        config: the config of the whole run.
        device: this rank's device.
        stop: the request to end early.
        claimed: what `claim_folder` returned.
        files: what a saved model needs besides its weights (`export.files_beside_weights`).
        references: the provider of `ref_logps`, if there is one.
    """

    def __init__(
        self,
        config: DictConfig,
        device: torch.device,
        stop: StopRequest,
        claimed: tuple[Checkpoints, IO | None],
        source: Source,
        learners: Mapping[str, Learner],
        files: FilesInMemory,
        n_steps: int,
        timers: Timers,
        traffic: Traffic,
        references: Any = None,
    ):
        self.config, self.device, self.stop = config, device, stop
        self.checkpoints, self.lock = claimed
        self.source, self.learners, self.files = source, learners, files
        self.resumable = Resumable(source, references)
        self.n_steps, self.timers, self.traffic = n_steps, timers, traffic
        self.metrics: Metrics | None = None  # on rank 0
        self.best: dict[str, Any] = {}
        self.health: dict[str, Any] = {}
        self.unwritten: str | None = None  # why something could not be written
        self.done = False

    # -------------------------------------------------------------------- where a run begins

    def resume(self) -> Start:
        """Load the checkpoint that `trainer.load_ckpt_from` names, if any."""
        which, state = self.config.trainer.load_ckpt_from, None
        if which is not None:
            state = self.checkpoints.load(which, self.learners, self.resumable)
        state = {"step": 0, "unfinished": None, "run_id": None, "best": {}, "health": {}} | (
            state or {}
        )
        self.best, self.health = state["best"], state["health"]
        return Start(state["step"], state["unfinished"], state["run_id"])

    def open_folder(self, start: Start) -> None:
        """Move aside what the run does not continue, and begin to log (a collective)."""
        on_all_ranks(lambda: self._open_folder(start) if rank() == 0 else None, CheckpointError)
        self.best = broadcast(self.best)

    def _open_folder(self, start: Start) -> None:
        logged = start.step - (start.unfinished is not None)
        try:
            self.checkpoints.set_aside(start.step)
            self.checkpoints.tidy()  # a run that was killed may not have done it
            for name in ("final", "best"):
                try_to_move(self.path(name))
            if self.config.trainer.get("keep_best"):
                self.best = existing_best(self.best, self.path("best"))
            self.metrics = Metrics(self.config, logged, start.run_id)
            record.write(self.path(""), self.config, world_size(), start.step)
        except OSError as error:
            raise CheckpointError(in_the_way(self.path(""), error, self.path(""))) from error

    # -------------------------------------------------------------------- what is saved

    def position(self) -> Position:
        return Position(self.source.state_dict(), rng_state(self.device))

    def save(
        self, step: int, source: dict[str, Any], unfinished: dict[str, float] | None = None
    ) -> None:
        """Write the checkpoint of `step`.

        source: the source's state.
        unfinished: the step's metrics, if a resumed run must finish the step.
        """
        with self.timers("save"):
            state = {
                "best": self.best, "health": self.health, "unfinished": unfinished,
                "run_id": self.metrics.run_id if self.metrics else None,
            }  # fmt: skip
            position = self.resumable.complete(source)
            self.checkpoints.save(step, self.learners, position, state)

    def save_unless_saved(
        self, step: int, position: Position, unfinished: dict[str, float] | None = None
    ) -> Path:
        """Save the state after `step`, as it was at `position`, unless saved; returns where."""
        folder = self.checkpoints.path(step)
        self.checkpoints.wait()
        if not broadcast(folder.exists()):
            set_rng_state(position.rng, self.device)
            self.save(step, position.source, unfinished)
            self.checkpoints.wait()
        return folder

    def save_model(self, name: str) -> None:
        """Write `final` or `best`."""
        actor = self.learners["actor"]
        actor.load()
        save_model(actor, self.files, self.path(name), str(self.config.trainer.save_dtype))
        actor.offload()

    def save_if_best(self, step: int, metrics: dict[str, float]) -> None:
        """Write `best` if an evaluation beats all earlier ones by its `test/score`, or without that
        by its `test/loss`, of which less is better (a collective)."""
        found = broadcast(value_of(metrics))
        if found is None:
            return
        name, value = found
        if name in self.best and BEST[name] * (value - self.best[name]) <= 0:
            return
        best = {"step": step, name: value}
        try:
            if step > 0 and self.config.trainer.get("keep_best"):
                with self.timers("save"):
                    self.save_model("best")
                    if rank() == 0:
                        best["model"] = fingerprint_of(self.path("best"))
            self.best = best
        except CheckpointError as error:  # raised at the end of the step
            self.unwritten = str(error)

    # -------------------------------------------------------------------- how it stops

    @contextmanager
    def save_if_interrupted(
        self,
        step: int,
        position: Position | None = None,
        unfinished: dict[str, float] | None = None,
    ) -> Iterator[None]:
        """If the body is interrupted, save the state after `step`, and say where it is.

        position: the run's position after `step`; None takes the one at the interruption.
        unfinished: the step's metrics, if they are not logged yet.
        """
        try:
            yield
        except Interrupted:
            self._save_and_stop(step, position or self.position(), unfinished)

    def _save_and_stop(
        self, step: int, position: Position, unfinished: dict[str, float] | None
    ) -> NoReturn:
        if step == 0:
            raise Interrupted("asked to stop before anything was learned; nothing was saved")
        saved = self.save_unless_saved(step, position, unfinished)
        raise Interrupted(
            f"asked to stop: step {step} is in {saved}; trainer.load_ckpt_from=latest resumes there"
        )

    @contextmanager
    def save_if_update_fails(self, step: int, position: Position) -> Iterator[None]:
        """If the update after `step` fails before it has changed anything, save the state after
        `step`, as it was at `position`."""
        updates = self._updates()
        try:
            yield
        except TrainingError as error:
            if step == 0 or self._updates() > updates:
                raise  # nothing was learned, or only a part of a step
            saved = self.save_unless_saved(step, position)
            raise TrainingError(f"{error}; step {step} is in {saved}") from error

    def _updates(self) -> int:
        return sum(learner.scheduler.last_epoch for learner in self.learners.values())

    def raise_if_stopped(self) -> None:
        """Raise on all ranks if one of them was asked to stop or failed to write a checkpoint (a
        collective)."""
        flags = torch.tensor([self.stop.number is not None, self.checkpoints.failed]).int()
        stop, failed = sum_over_ranks(flags).tolist()
        if failed:
            self.checkpoints.wait()
        if stop:
            raise Interrupted

    def raise_if_unhealthy(self, step: int, metrics: dict[str, float]) -> None:
        """Save and stop a run that is unhealthy or cannot write its files (a collective).

        metrics: those of the step.
        """
        unwritten = problem = None
        if rank() == 0:
            unwritten = self.unwritten
            if unwritten is None and self.source.unwritten is not None:
                unwritten = self._cannot_write(*self.source.unwritten)
            if unwritten is None:
                self.health, problem = observe(self.config, self.health, metrics)
        unwritten, problem = broadcast((unwritten, problem))
        if unwritten is None and problem is None:
            return
        # A resumed run writes what is missing, except this step's responses: they are lost, since
        # they were trained on already.
        unfinished = None if unwritten is None else metrics
        saved = self.save_unless_saved(step, self.position(), unfinished)
        if unwritten is not None:
            raise CheckpointError(f"{unwritten}; step {step} is in {saved}")
        raise HealthError(f"{problem}; step {step} is in {saved}")

    # -------------------------------------------------------------------- what it logs

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the row of a step, with timings, memory, and what was sent since `metrics`, which a
        resumed run that finishes a step sends anew."""
        row = metrics | self.timers.pop()
        for name, n_bytes in self.traffic.pop().items():
            row[name] = row.get(name, 0.0) + n_bytes
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row["memory/peak_gib"] = peak / 2**30
        if self.metrics:
            try:
                self.metrics.log(step, self.n_steps, row)
            except OSError as error:
                self.unwritten = self._cannot_write(self.metrics.path, error)

    def finish(self, step: int) -> None:
        """Save the last step and the model, and say where they are."""
        saved = self.save_unless_saved(step, self.position())
        try:
            self.save_model("final")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; step {step} is in {saved}; trainer.load_ckpt_from=latest resumes there"
            ) from error
        logger.info("model: %s", self.path("final"))
        if self.best:
            logger.info("%s", self._best_line())
        logger.info("metrics: %s", self.path("metrics.jsonl"))
        self.done = True

    def _best_line(self) -> str:
        step, (name, value) = self.best["step"], value_of(self.best)
        if step == 0:
            return f"no evaluation beat the start: {name} was {value:.4f} before training"
        kept = "in best" if self.config.trainer.keep_best else "not kept: trainer.keep_best=false"
        return f"best evaluation: {name} {value:.4f} at step {step} ({kept})"

    def _cannot_write(self, path: Path, reason: OSError | str) -> str:
        if isinstance(reason, OSError):
            reason = reason.strerror or str(reason)
        return cannot_write(self.path(""), path, reason)

    def path(self, name: str) -> Path:
        """The path of a name in the run's folder."""
        return Path(self.config.trainer.save_dir) / name

    def close(self) -> None:
        """Close the checkpoints and the log, and unlock the folder."""
        self.checkpoints.close()
        if self.metrics:
            self.metrics.close(self.done)
        if self.lock:
            self.lock.close()
