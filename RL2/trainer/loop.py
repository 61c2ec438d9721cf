"""The loop. Every trainer is this one, with another source, loss and advantage by config."""

import logging
import math
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from RL2.algorithms.advantages import resolve_advantage
from RL2.algorithms.kl import approx_kl
from RL2.algorithms.rewards import in_float32
from RL2.algorithms.token_loss import TokenLoss, resolve_loss
from RL2.config.models import ask_hub
from RL2.datasets.end_of_turn import EndTokens, load_end_tokens
from RL2.distributed import Traffic, broadcast, rank, sum_over_ranks, world_size
from RL2.distributed.agreement import all_or_none, check_same, together
from RL2.distributed.comm import Batch
from RL2.runtime.errors import CheckpointError, ConfigError, HealthError, Interrupted, TrainingError
from RL2.runtime.folders import cannot_write, in_the_way, lock, try_to_move
from RL2.runtime.process_tree import reap_adopted
from RL2.runtime.stop import StopRequest
from RL2.trainer.checkpoints import record
from RL2.trainer.checkpoints.checkpoint import Checkpoints, rng_state, set_rng_state
from RL2.trainer.checkpoints.export import (
    best_that_is_there,
    fingerprint_of,
    keep_files,
    save_model,
)
from RL2.trainer.health import observe
from RL2.trainer.sinks.metrics import Metrics, Timers
from RL2.trainer.sources import DatasetSource, RolloutSource
from RL2.trainer.startup import machine
from RL2.trainer.startup.banner import banner
from RL2.trainer.startup.ends import missing_ends, name_ends
from RL2.trainer.startup.fingerprints import of_run, readable
from RL2.trainer.startup.models import load_reference, load_tokenizer
from RL2.trainer.startup.shared_folder import check_shared
from RL2.trainer.startup.started_with import files_behind
from RL2.workers import Actor

logger = logging.getLogger(__name__)

# What the keys that only rollouts have amount to when the tokens come from a data set.
_ON_DATA = OmegaConf.create(
    {
        "update_per_rollout": 1,
        "tis_coef": 0.0,
        "tis_type": "truncate",
        "kl": {"coef": 0.0, "type": None},
    }
)


def required_fields(config: DictConfig, loss: TokenLoss) -> tuple[str, ...]:
    """Log-probabilities that must be computed between rollout and update.

    `old_logps` are needed only where the policy moves away from the one that sampled (several
    optimizer steps a rollout, in a loss or importance weights that look back) or where the KL
    enters rewards or advantages; with one step they are the update's own, without a second forward.
    """
    kl = config.actor.kl
    looks_back = "old_logps" in loss.fields or config.actor.tis_coef > 0
    old = config.actor.update_per_rollout > 1 and looks_back
    old |= kl.coef > 0 and kl.type in ("reward", "advantage")
    ref = kl.coef > 0 or "ref_logps" in loss.fields
    return ("old_logps",) * old + ("ref_logps",) * ref


def check_loss(config: DictConfig, loss: TokenLoss) -> None:
    """ConfigError where this run cannot give the loss what it names, or would ignore a key."""
    if loss.draws and config.actor.get("tp_size", 1) > 1:
        raise ConfigError(
            f"actor.tp_size={config.actor.tp_size}: the loss {loss.name} draws random numbers, and "
            "ranks that share their tokens would draw others; use actor.tp_size=1, or a "
            "torch.Generator with a seed"
        )
    if "rollout" not in config:
        if missing := set(loss.fields) - {"advantages", "old_logps"}:
            raise ConfigError(
                f"actor.loss: {loss.name} needs {', '.join(sorted(missing))}, which rows of a data "
                f"set do not have; use a loss over token statistics, or a trainer with rollouts"
            )
        return
    kl = config.actor.kl
    ignored = config.actor.avg_level == "correct" and not loss.uses_advantages
    if ignored and kl.coef > 0 and kl.type != "loss":
        raise ConfigError(
            f"actor.kl.type={kl.type}: has no effect with actor.avg_level=correct and the loss "
            f"{loss.name}, which do not read the advantages; use actor.kl.type=loss"
        )


def add_advantages(batch: Batch, config: DictConfig, estimator: Callable[..., Tensor]) -> Batch:
    """Rank 0: `advantages [B, T]` by `adv.estimator`, with the KL taken off where asked. They and
    the rewards, which are in float64 until then, are float32."""
    kl, mask = config.actor.kl, batch["action_mask"]
    rewards, penalty = batch["rewards"], torch.zeros(())
    if kl.coef > 0 and kl.type in ("reward", "advantage"):
        estimate = approx_kl(batch["old_logps"], batch["ref_logps"], kl.reward_estimator)
        penalty = kl.coef * estimate * mask
    if kl.type == "reward":
        rewards = rewards - penalty
    advantages = in_float32(estimator(rewards, mask, batch["sample_ids"], batch["group_ids"]))
    if kl.type == "advantage":
        advantages = advantages - penalty
    return batch | {"rewards": batch["rewards"].float(), "advantages": advantages}


class Trainer:
    """Sets a run up, cheapest part first, so that bad input stops it before a model loads.

    Args:
        config: a composed, validated and resolved config.
        device: this rank's device.
        stop: says whether to end early; None never does.
    """

    def __init__(self, config: DictConfig, device: torch.device, stop: StopRequest | None = None):
        self.config, self.device = config, device
        self.stop = stop or StopRequest()
        self.is_rl = "rollout" in config
        self.timers, self.traffic = Timers(), Traffic()
        self.alarmed = self.done = False
        self.metrics: Metrics | None = None
        self.unwritten: str | None = None  # what there was no room for in the step
        check_shared(config.trainer.save_dir)
        torch.manual_seed(config.trainer.seed + rank())

        ends, missing = all_or_none(self._read_inputs)
        check_same(files_behind(config, self.inputs, self.source.datasets))
        n_steps = config.trainer.n_epochs * len(self.source.loader)
        self.n_steps = min(n_steps, config.trainer.max_steps or n_steps)

        self.checkpoints = Checkpoints(
            config.trainer.save_dir,
            config.trainer.keep_last,
            config,
            background=config.trainer.async_save,
        )
        about = self.checkpoints.about(config.trainer.load_ckpt_from)
        self.checkpoints.threads = machine.use_threads(config.trainer.num_threads, about)
        self.checkpoints.machines = machine.all_machines(device)
        self.checkpoints.inputs = readable(self.inputs)
        if config.trainer.load_ckpt_from is not None:
            self.checkpoints.check(config.trainer.load_ckpt_from)
        self.lock = all_or_none(lambda: lock(config.trainer.save_dir) if rank() == 0 else None)
        actor = config.actor if self.is_rl else OmegaConf.merge(_ON_DATA, config.actor)
        self.actor = Actor(actor, device, self.loss, config.trainer.max_bad_steps, self.traffic)
        name_ends(self.actor.hf_model, ends.saved, missing)
        self.kept = all_or_none(lambda: keep_files(self.actor, self.tokenizer))
        self.actor.prepare_scheduler(self.n_steps * actor.update_per_rollout)
        if self.is_rl and config.rollout.dtype == "auto":  # on CUDA: one dtype for both
            config.rollout.dtype = str(self.actor.dtypes.compute).removeprefix("torch.")
        self.policies = {"old_logps": self.actor}
        if "ref_logps" in self.required:
            self.policies["ref_logps"] = load_reference(config, device, self.traffic)
            self.policies["ref_logps"].offload()
        self.source.start(device)
        self.best: dict[str, Any] = {}
        self.health: dict[str, Any] = {}

    def _read_inputs(self) -> tuple[EndTokens, tuple[int, ...]]:
        """Loss, tokenizer, environment and data; returns the model's end tokens, and which of them
        its folder does not name. Nothing here waits for other ranks."""
        config = self.config
        self.loss = resolve_loss(config.actor.loss)
        check_loss(config, self.loss)
        self.estimator = resolve_advantage(config.adv) if self.is_rl else None
        self.tokenizer = load_tokenizer(config)
        ends = load_end_tokens(config.actor, self.tokenizer)
        source = RolloutSource if self.is_rl else DatasetSource
        self.source = source(config, self.tokenizer, ends)
        missing = missing_ends(config, self.tokenizer, ends, self.source.end_ids)
        self.required = required_fields(config, self.loss) if self.is_rl else ()
        if "ref_logps" in self.required:
            ask_hub(config.ref_actor, "ref_actor")
        models = ("actor", "ref_actor") if "ref_logps" in self.required else ("actor",)
        self.inputs = of_run(config, self.tokenizer, ends, self.source.datasets, models)
        return ends, missing

    def train(self) -> None:
        """Train to the last step, wherever the run stands, and leave the model in `final`.

        Raises:
            Interrupted, HealthError: the run was asked to stop, or is dying. What it has learned
                is in a checkpoint.
        """
        done, unfinished = self._resume()
        self.stop.call(self.source.interrupt)
        for line in banner(
            self.config, self.device, world_size(), self.actor.model.parameters(),
            self.actor.dtypes.compute, self.source.rows_of_data, done, self.n_steps,
        ):  # fmt: skip
            logger.info("%s", line)
        with logging_redirect_tqdm(), self._bar(done) as bar:
            if unfinished is not None:
                self._conclude(done, self._end_step(done, unfinished))
            elif done == 0:
                if metrics := self._end_step(0, {}):
                    self._log(0, metrics | self.traffic.pop())
            for step in range(done + 1, self.n_steps + 1):
                with self.timers("step"):
                    metrics = self._step(step)
                self._conclude(step, metrics)
                if self._due(self.config.trainer.save_freq, step):
                    self._save(step, self.source.state_dict())
                bar.update()
        self._finish(max(done, self.n_steps))

    def _step(self, step: int) -> dict[str, float]:
        before = self._position()
        try:
            with self.timers("rollout"):
                batch, metrics = self.source.collect(step, last=step == self.n_steps)
        except Interrupted:
            self._stop(step - 1, before)
        if self.is_rl:
            batch = self._annotate(batch)
        updates = self.actor.scheduler.last_epoch
        try:
            with self.timers("update_actor"):
                metrics |= self.actor.update(batch, step)
        except TrainingError as error:
            if step == 1 or self.actor.scheduler.last_epoch > updates:
                raise  # nothing was learned, or half of this step
            saved = self._keep(step - 1, before)
            raise TrainingError(f"{error}; step {step - 1} is in {saved}") from error
        if self.is_rl:
            metrics |= self._compare(metrics)
        return self._end_step(step, metrics)

    def _end_step(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """All that follows an update. Where that is broken off, the run that goes on does it."""
        try:
            if step > 0:
                with self.timers("rollout"):
                    self.source.finish()
            flags = torch.tensor([self.stop.number is not None, self.checkpoints.failed]).int()
            stop, failed = sum_over_ranks(flags).tolist()
            if failed:
                self.checkpoints.wait()
            if stop:
                raise Interrupted
            if step > 0:
                with self.timers("update_rollout"):
                    self._publish(step)
            if step == 0 or self._due(self.config.trainer.get("test_freq"), step):
                metrics = metrics | self._evaluate(step)
        except Interrupted:
            self._stop(step, self._position(), metrics | self.traffic.pop())
        return metrics

    def _position(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What decides the next step beside the weights: position in the data, random states."""
        return self.source.state_dict(), rng_state(self.device)

    def _stop(
        self,
        step: int,
        position: tuple[dict[str, Any], dict[str, Tensor]],
        unfinished: dict[str, float] | None = None,
    ) -> NoReturn:
        """Save what `step` has left, as it was at `position`, and raise Interrupted.

        unfinished: the step's metrics, if it is not logged yet.
        """
        if step == 0:
            raise Interrupted("asked to stop before anything was learned; nothing was saved")
        saved = self._keep(step, position, unfinished)
        raise Interrupted(
            f"asked to stop: step {step} is in {saved}; trainer.load_ckpt_from=latest goes on there"
        )

    def _keep(
        self,
        step: int,
        position: tuple[dict[str, Any], dict[str, Tensor]],
        unfinished: dict[str, float] | None = None,
    ) -> Path:
        """Save what `step` has left, as it was at `position`, unless it is saved; where that is."""
        saved = self.checkpoints.path(step)
        self.checkpoints.wait()
        if not broadcast(saved.exists()):
            source, rng = position
            set_rng_state(rng, self.device)
            self._save(step, source, unfinished)
            self.checkpoints.wait()
        return saved

    def _conclude(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step, and stop a run that is dying or has no room to write, saved as it is."""
        metrics = metrics | self.traffic.pop()
        self._log(step, metrics)
        reap_adopted()
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
        # What there was no room for, the run that goes on writes, but for this step's answers: they
        # are trained on, and gone.
        saved = self._keep(step, self._position(), None if unwritten is None else metrics)
        if unwritten is not None:
            raise CheckpointError(f"{unwritten}; step {step} is in {saved}")
        raise HealthError(f"{problem}; step {step} is in {saved}")

    def _compare(self, metrics: dict[str, float]) -> dict[str, float]:
        """Whether engine and trainer disagree too much; warned of when it begins."""
        bound, kl = self.config.rollout.llm_kl_alarm, metrics.get("rollout/llm_kl")
        if bound is None or kl is None:
            return {}
        if kl > bound and not self.alarmed:
            logger.warning(
                "rollout/llm_kl is %.3g, above rollout.llm_kl_alarm=%g: engine and trainer give "
                "the sampled tokens different probabilities; look at rollout/staleness, at "
                "rollout.dtype and actor.dtype, and whether rollout.train_sampling_params matches "
                "actor.temperature; actor.tis_type=mask leaves such tokens out", kl, bound,
            )  # fmt: skip
        self.alarmed = kl > bound
        return {"rollout/llm_kl_alarm": float(self.alarmed)}

    def _annotate(self, batch: Batch | None) -> Batch | None:
        """What the loss needs beside the rollout: other policies' logps, and advantages."""
        empty = broadcast(batch is None)
        for field in () if empty else self.required:
            with self.timers(f"compute_{field}"):
                batch = self.policies[field].annotate(batch, field)
        return None if batch is None else add_advantages(batch, self.config, self.estimator)

    def _evaluate(self, step: int) -> dict[str, float]:
        with self.timers("evaluate"):
            metrics = self.source.evaluate(step)
        score = broadcast(metrics.get("test/score"))
        if score is None:
            return metrics
        if score > self.best.get("test/score", -math.inf):
            best = {"step": step, "test/score": score}
            try:
                if step > 0 and self.config.trainer.keep_best:
                    with self.timers("save"):
                        self._save_model("best")
                        if rank() == 0:
                            best["model"] = fingerprint_of(self._path("best"))
                self.best = best
            except CheckpointError as error:  # the step comes to its end first
                self.unwritten = str(error)
        return metrics

    def _resume(self) -> tuple[int, dict[str, float] | None]:
        """The last step that was done, and its metrics where they have not been logged."""
        state = None
        if self.config.trainer.load_ckpt_from is not None:
            state = self.checkpoints.load(
                self.config.trainer.load_ckpt_from, self.actor, self.source
            )
        state = {"unfinished": None, "health": {}} | (
            state or {"step": 0, "best": {}, "run_id": None}
        )
        self.best, self.health = state["best"], state["health"]
        # At the start, too: servers may hold anything, and weights that do not arrive stop the run
        # before the first rollout.
        # (A step that was broken off brings them there when it goes on.)
        if state["unfinished"] is None:
            self._publish(state["step"])
        if state["step"] > 0:
            self.traffic.pop()  # belongs to no step
        together(
            partial(self._open_folder, state) if rank() == 0 else lambda: None,
            CheckpointError,
        )
        self.best = broadcast(self.best)
        return state["step"], state["unfinished"]

    def _open_folder(self, state: dict[str, Any]) -> None:
        """Rank 0: leave there what the run continues, and begin to log."""
        logged = state["step"] - (state["unfinished"] is not None)
        try:
            self.checkpoints.set_aside(state["step"])
            self.checkpoints.tidy()  # a run that was killed may not have come to it
            for name in ("final", "best"):
                try_to_move(self._path(name))
            if self.config.trainer.get("keep_best"):
                self.best = best_that_is_there(self.best, self._path("best"))
            self.metrics = Metrics(self.config, logged, state["run_id"])
            record.write(self._path(""), self.config, world_size(), state["step"])
        except OSError as error:
            raise CheckpointError(in_the_way(self._path(""), error, self._path(""))) from error

    def _publish(self, step: int) -> None:
        """The actor's weights to the engine, which from then on has the device's memory."""
        self.actor.load()
        self.source.publish(self.actor, step)
        self.actor.offload()

    def _save(
        self, step: int, source: dict[str, Any], unfinished: dict[str, float] | None = None
    ) -> None:
        with self.timers("save"):
            run_id = self.metrics.run_id if self.metrics else None
            state = {
                "best": self.best, "health": self.health, "run_id": run_id,
                "unfinished": unfinished,
            }  # fmt: skip
            self.checkpoints.save(step, self.actor, source, state)

    def _finish(self, step: int) -> None:
        saved = self._keep(step, self._position())
        try:
            self._save_model("final")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; step {step} is in {saved}; trainer.load_ckpt_from=latest goes on there"
            ) from error
        logger.info("model: %s", self._path("final"))
        if self.best:
            logger.info("%s", self._best_line())
        logger.info("metrics: %s", self._path("metrics.jsonl"))
        self.done = True

    def _best_line(self) -> str:
        step, score = self.best["step"], self.best["test/score"]
        if step == 0:
            return f"no evaluation beat the start: test/score was {score:.4f} before training"
        kept = "in best" if self.config.trainer.keep_best else "not kept: trainer.keep_best=false"
        return f"best evaluation: test/score {score:.4f} at step {step} ({kept})"

    def _save_model(self, name: str) -> None:
        self.actor.load()
        dtype = str(self.config.trainer.save_dtype)
        save_model(self.actor, self.kept, self._path(name), dtype)
        self.actor.offload()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        metrics = metrics | self.timers.pop()
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics["memory/peak_gib"] = peak / 2**30
        if self.metrics:
            try:
                self.metrics.log(step, self.n_steps, metrics)
            except OSError as error:
                self.unwritten = self._cannot_write(self.metrics.path, error)

    def _bar(self, done: int) -> tqdm:
        return tqdm(
            total=self.n_steps, initial=done, desc="train", disable=rank() != 0, dynamic_ncols=True
        )

    def _cannot_write(self, path: Path, reason: OSError | str) -> str:
        if isinstance(reason, OSError):
            reason = reason.strerror or str(reason)
        return cannot_write(self._path(""), path, reason)

    def _path(self, name: str) -> Path:
        return Path(self.config.trainer.save_dir) / name

    @staticmethod
    def _due(frequency: int | None, step: int) -> bool:
        return frequency is not None and step % frequency == 0

    def close(self) -> None:
        self.source.close()
        self.checkpoints.close()
        if self.metrics:
            self.metrics.close(self.done)
        if self.lock:
            self.lock.close()
