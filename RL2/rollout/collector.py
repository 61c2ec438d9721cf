"""The collector: prompts in, a batch of judged token sequences and metrics out.

Some ranks drive an engine. Each of them answers its share of the prompts; rank 0 gets everything.
Samples depend on the run's seed, the step and a prompt's place in the step, not on the number of
drivers or the order of answers: a batch holds the first groups, in the order of the prompts, that
teach something. (Only with `rollout.partial_rollout`, the order of answers counts.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.datasets.end_of_turn import EndTokens
from RL2.distributed.traffic import Traffic
from RL2.engines.protocol import Engine, SamplingParams
from RL2.environments.environment import Environment, load_environment
from RL2.rollout.driver import Driver
from RL2.rollout.failures import FailureCount
from RL2.rollout.judges.judge import Judge, fields_of
from RL2.rollout.overlong import Overlong
from RL2.rollout.player import Player
from RL2.rollout.reports import Reports
from RL2.rollout.rounds import Rounds
from RL2.rollout.sample_table import SampleTable, dump, gather_samples, summarise, to_batch
from RL2.rollout.shown import shown
from RL2.rollout.step import Draw, Item, Step
from RL2.runtime.event_loop import EventLoopThread

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Collector:
    """Collects rollouts. Every rank creates one, and all ranks call its methods together.

    Its event loop runs in a separate thread for the whole run, so that an engine can watch its
    servers while this thread trains.

    Args:
        config: the `rollout` node: env_path, env_timeout, env_workers, max_env_errors,
            max_malformed, max_turns, max_in_flight, responses_per_prompt, truncated,
            dynamic_filtering, max_resampled, partial_rollout, over_sampling, train_sampling_params,
            test_sampling_params.
        tokenizer: the policy's tokenizer.
        engine: this rank's engine, None if it has none; the collector starts and closes it.
        seed: the run's seed.
        environment: the environment, which the collector closes; None loads `config.env_path`.
        rollouts_dir: folder in which rank 0 writes every rollout as jsonl; None writes nothing. The
            same on every rank, as each rank makes the lines of its samples.
        n_ranks, rank: size and rank in `group`.
        drivers: the ranks that have an engine, None for all.
        group: process group that supports CPU tensors; None is the default group. A rollout in
            another thread than training needs a separate group.
        test_responses_per_prompt: answers per prompt in evaluation.
        max_length: most tokens in one sequence; a sample whose next turn might not fit ends.
        progress: whether to show a progress bar; None shows it on a terminal.
        device: this rank's device.
        ends: end tokens of the policy; None takes those of the tokenizer.
        n_shown: number of answers that each evaluation logs in readable form.
        judges: judges of training groups.

    Raises ConfigError for an environment file that cannot be used, EngineError when the engine
    does not start.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine | None,
        *,
        seed: int,
        environment: Environment | None = None,
        rollouts_dir: str | Path | None = None,
        n_ranks: int = 1,
        rank: int = 0,
        drivers: tuple[int, ...] | None = None,
        group: dist.ProcessGroup | None = None,
        test_responses_per_prompt: int = 1,
        max_length: int | None = None,
        progress: bool | None = None,
        device: torch.device | None = None,
        ends: EndTokens | None = None,
        n_shown: int = 0,
        judges: tuple[Judge, ...] = (),
    ):
        self.environment = environment or load_environment(
            config.env_path, timeout=float(config.env_timeout), workers=config.env_workers
        )
        self.engine = engine
        self.rollouts_dir = None if rollouts_dir is None else Path(rollouts_dir)
        # Rank 0: the first rollouts that could not be dumped, and why.
        self.unwritten: tuple[Path, OSError] | None = None
        self.n_ranks, self.rank, self.group = n_ranks, rank, group
        self.responses_per_prompt = {
            True: int(config.responses_per_prompt),
            False: test_responses_per_prompt,
        }
        self.sampling = {
            True: SamplingParams.from_config(config.train_sampling_params),
            False: SamplingParams.from_config(config.test_sampling_params),
        }
        self.dynamic_filtering = bool(config.dynamic_filtering)
        self.max_resampled = int(config.max_resampled)
        self.partial_rollout = bool(config.partial_rollout)
        self.over_sampling: int | None = config.over_sampling
        self.truncated = str(config.get("truncated", "keep"))
        self.overlong = Overlong(
            int(config.get("overlong_buffer", 0)), float(config.get("overlong_penalty", 1.0))
        )
        self.rewards = {name: float(x) for name, x in (config.get("rewards") or {}).items()}
        self.failures = FailureCount(
            {"env": config.max_env_errors, "malformed": config.max_malformed}
        )
        self.n_shown, self.judges = n_shown, judges
        self._loop = EventLoopThread(device)
        self._rounds: Rounds | None = None
        driver = None
        reports = Reports(self.failures, self.environment.path, rank, n_ranks, group)
        ranks = tuple(range(n_ranks)) if drivers is None else drivers
        if engine is None:
            self.run(self.environment.close())  # not used on this rank
        else:
            settled = asyncio.Event()
            settled.set()
            try:
                self.run(engine.start(settled))
            except BaseException:
                self.close()
                raise
            limits = [limit for limit in (max_length, engine.context_length) if limit is not None]
            player = Player(
                engine,
                self.environment,
                tokenizer,
                seed=seed,
                max_turns=int(config.max_turns),
                max_length=min(limits, default=None),
                ends=ends,
                truncated=self.truncated,
                overlong=self.overlong,
                rewards=self.rewards,
                settled=settled,
            )
            driver = Driver(player, int(config.max_in_flight), self.failures, judges)
        self._rounds = Rounds(driver, ranks, self._loop, reports, self.environment, progress)

    @property
    def carried(self) -> list[Item]:
        """Prompts that were begun and are in no batch yet, the same on all ranks."""
        return self._rounds.carried

    def state_dict(self) -> dict[str, Any]:
        """The failure counts, and the groups that this rank carries to the next step, with
        everything written so far."""
        return {
            "env_errors": self.failures.of_run["env"],
            "malformed": self.failures.of_run["malformed"],
            "carried": self._rounds.state_dict(),
        }

    def load_state_dict(self, states: list[dict[str, Any]], items: list[Item]) -> None:
        """Continue from what `state_dict` returned on all ranks; the number of ranks may differ.

        items: the prompts of all carried groups, rank by rank. Must be empty without
            `rollout.partial_rollout`.
        """
        self.failures.of_run = {"env": states[0]["env_errors"], "malformed": states[0]["malformed"]}
        groups = [group for state in states for group in state["carried"]]
        filtering = self._filters(self.responses_per_prompt[True])
        self._rounds.load_state_dict(groups, items, self.sampling[True], filtering)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, e.g. of the engine, on the collector's event loop."""
        return self._loop.run(coroutine)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engines new weights. Iterating over the tensors may be a collective, so ranks
        without an engine do it, too. Raises EngineError naming a parameter."""

        async def iterate() -> None:
            for _ in named_tensors:
                pass

        update = self.engine.update_weights(named_tensors, version) if self.engine else iterate()
        self.run(update)

    def sleep(self) -> None:
        """Let the engine release memory until `wake`."""
        if self.engine is not None:
            self.run(self.engine.sleep())

    def wake(self) -> None:
        """Undo `sleep`. Does nothing when awake."""
        if self.engine is not None:
            self.run(self.engine.wake())

    def interrupt(self) -> None:
        """Abandon the current rollout or evaluation and all later ones: `collect` and
        `collect_step` raise Interrupted on all ranks. May be called from any thread."""
        self._rounds.interrupt()

    def close(self) -> None:
        """Close the engine and the event loop, even while they work. May be called twice."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        try:
            if self._rounds is not None:
                self._rounds.close()
            if self.engine is not None:
                loop.run(self.engine.close())
        finally:
            try:
                loop.run(self.environment.close())
            finally:
                loop.close()

    def collect(
        self,
        items: list[Item],
        step: int,
        train: bool,
        responses_per_prompt: int | None = None,
        sampled: bool = False,
    ) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        """Answer and judge exactly `items`, the same list on every rank (a collective).

        items: dicts with `extra_info`, and with `prompt` and `prompt_ids` unless the environment's
            `reset` returns them.
        sampled: evaluate with `train_sampling_params`; such rollouts get a file of their own.

        Returns (batch, metrics) on rank 0 and (None, {}) on the others. The batch has the fields of
        `to_batch`; it is None in evaluation and when no sample is left to learn from.

        `rollout/env_errors` and `rollout/malformed` count the whole run so far.

        Raises on every rank: EnvError when environments failed for more samples than
        `rollout.max_env_errors` allows, EngineError when an engine failed or sent more malformed
        replies than `rollout.max_malformed` allows, Interrupted after `interrupt`.
        """
        left = iter(items)
        n_responses = responses_per_prompt or self.responses_per_prompt[train]
        return self._collect(
            Step(
                step,
                train,
                n_responses,
                draw=lambda n: [item for _, item in zip(range(n), left, strict=False)],
                sampling=self.sampling[train or sampled],
                wanted=len(items),
                filtering=train and self._filters(n_responses),
                sampled=sampled,
            )
        )

    def collect_step(
        self, draw: Draw, n_prompts: int, step: int
    ) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        """A training batch of `n_prompts` groups, as far as the settings allow (a collective).

        With `rollout.dynamic_filtering`, up to `rollout.max_resampled` prompts are drawn in place
        of those that teach nothing. With `rollout.partial_rollout`, more prompts than needed are in
        flight; the step ends when it has the groups that it needs, and unfinished ones continue in
        the next step.

        draw: `draw(n)` returns the next n prompts, the same on every rank. It is called in this
            thread or, while this thread waits, in that of the event loop.

        Returns and raises like `collect`.
        """
        n_responses = self.responses_per_prompt[True]
        spare = 0
        if self.partial_rollout:
            spare = n_prompts // 2 if self.over_sampling is None else self.over_sampling
        filtering = self._filters(n_responses)
        return self._collect(
            Step(
                step,
                True,
                n_responses,
                draw,
                self.sampling[True],
                wanted=n_prompts,
                spare=spare,
                budget=self.max_resampled if filtering else 0,
                filtering=filtering,
                carries=self.partial_rollout,
            )
        )

    def _filters(self, n_responses: int) -> bool:
        # With one answer per prompt there is nothing to compare.
        return self.dynamic_filtering and n_responses > 1

    def _collect(self, step: Step) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        start = time.perf_counter()
        samples, n_resampled = self._rounds.answer(step)
        traffic = Traffic()
        fields = fields_of(self.judges) if step.train else ()
        table = SampleTable.of(samples, self.rollouts_dir is not None, fields, tuple(self.rewards))
        table = gather_samples(table, self.n_ranks, self.group, traffic)
        if table is None:
            return None, {}
        for text in shown(samples, 0 if step.train else self.n_shown):
            logger.info("%s", text)
        seconds = time.perf_counter() - start
        table = table.sorted()
        name = "train" if step.train else "test"
        if self.rollouts_dir is not None:
            kind = "sampled" if step.sampled else name
            path = self.rollouts_dir / f"step{step.number:06d}_{kind}.jsonl"
            try:
                dump(table, path)
            except OSError as error:  # not raised here, as the other ranks do not know of it
                self.unwritten = self.unwritten or (path, error)
        good = table.good()
        metrics = summarise(good, name)
        metrics["rollout/env_errors"] = float(self.failures.of_run["env"])
        metrics["rollout/malformed"] = float(self.failures.of_run["malformed"])
        if self.engine is not None:
            metrics |= self.engine.metrics()
        if not step.train:
            return None, metrics
        metrics |= traffic.pop()
        metrics["rollout/tokens"] = float(good.samples["length"].sum())
        if self.judges:
            metrics["rollout/judge_tokens"] = float(good.samples["judge_tokens"].sum())
            metrics["rollout/tokens"] += metrics["rollout/judge_tokens"]
        if self.overlong.buffer and len(good):
            metrics["train/overlong_penalty"] = (
                (good.samples["reward"] - good.samples["earned"]).mean().item()
            )
        metrics["rollout/tokens_per_s"] = metrics["rollout/tokens"] / seconds
        if self.truncated == "mask":
            good = good.whole()
        if step.filtering:
            good, metrics["rollout/dynamic_filtering_ratio"] = good.without_equal_groups()
            metrics["rollout/resampled"] = float(n_resampled)
        if step.carries:
            metrics["rollout/unfinished"] = float(len(self.carried))
        return to_batch(good, step.n_responses, self.rewards), metrics
