"""The collector: prompts in, a batch of judged token sequences and metrics out.

Some ranks drive an engine. Each of them answers its share of the prompts; rank 0 gets everything.
What is sampled depends on the run's seed, the step and a prompt's place in the step, not on the
number of drivers, nor on which answer comes first: a batch holds the first groups, in the order
of the prompts, that teach something. (`rollout.partial_rollout` alone goes by who is first.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from RL2.datasets.end_of_turn import EndTokens
from RL2.distributed.traffic import Traffic
from RL2.engines.protocol import Engine, SamplingParams
from RL2.environments.environment import Environment, load_environment
from RL2.environments.source import hints
from RL2.rollout.failures import Failure, FailureCount, lines
from RL2.rollout.flight import Flight
from RL2.rollout.player import Gate, Player
from RL2.rollout.sample_table import SampleTable, dump, gather_samples, summarise, to_batch
from RL2.rollout.samples import Group, Sample
from RL2.rollout.shown import shown
from RL2.runtime.errors import EngineError, Interrupted
from RL2.runtime.event_loop import EventLoopThread

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = dict[str, Any]
Draw = Callable[[int], list[Item]]


@dataclass(frozen=True)
class _Step:
    """What is asked for. wanted: groups that shall teach something. spare: prompts in flight
    beyond those. budget: prompts to draw at most for those that teach nothing. cut: the step
    ends with the last group wanted, and the others are carried to the next. sampled: an
    evaluation that samples as training does."""

    number: int
    train: bool
    n_responses: int
    draw: Draw
    wanted: int
    spare: int = 0
    budget: int = 0
    cut: bool = False
    sampled: bool = False


@dataclass
class _Report:
    """What one rank tells the others after a round.

    n_teach: groups for the batch. taken: positions that are done with. kept: those that stay in
    flight there, in order. n_refilled: prompts that it drew on its own. failed: samples that count
    for nothing. unknown: keys of the environment's answers that nobody reads. failure: of the rank
    itself.
    """

    n_teach: int = 0
    taken: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    n_refilled: int = 0
    failed: list[Failure] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    failure: str | None = None
    interrupted: bool = False


class _TooManyFailures(Exception):
    """Environments failed more often in this step than `rollout.max_env_errors` allows. failed: the
    samples of this round."""

    def __init__(self, failed: list[Failure]):
        super().__init__(failed)
        self.failed = failed


class Collector:
    """Collects rollouts; every rank makes one and calls its methods together.

    Its event loop runs in a thread of its own, for the whole run: what an engine supervises there
    goes on while this thread trains.

    Args:
        config: the `rollout` node: env_path, env_timeout, env_workers, max_env_errors,
            max_malformed, max_turns, max_in_flight, responses_per_prompt, truncated,
            dynamic_filtering, max_resampled, partial_rollout, over_sampling, train_sampling_params,
            test_sampling_params.
        tokenizer: of the policy.
        engine: this rank's engine, None where it does not drive one; the collector starts and
            closes it.
        seed: of the run.
        environment: None loads `config.env_path`; the collector closes it.
        rollouts_dir: where rank 0 writes every rollout as jsonl; None writes nothing. The same
            on every rank, as the lines are made where the samples are.
        n_ranks, rank: of the default process group, or of `group`.
        drivers: the ranks that have an engine, None for all.
        group: process group that can carry CPU tensors; None is the default group. A rollout in
            another thread than the one that trains needs a group of its own.
        test_responses_per_prompt: answers per prompt in evaluation.
        max_length: most tokens in one sequence; a sample whose next turn might not fit ends.
        progress: True shows a progress bar, False does not, None does on a terminal.
        device: of this rank.
        ends: end tokens of the policy; None: what the tokenizer alone says.
        n_shown: answers that each evaluation logs, in readable form.

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
    ):
        self.environment = environment or load_environment(
            config.env_path, timeout=float(config.env_timeout), workers=config.env_workers
        )
        self.engine = engine
        self.rollouts_dir = None if rollouts_dir is None else Path(rollouts_dir)
        # Rank 0: the first rollouts that could not be dumped, and why.
        self.unwritten: tuple[Path, OSError] | None = None
        self.n_ranks, self.rank, self.group = n_ranks, rank, group
        self.drivers = tuple(range(n_ranks)) if drivers is None else drivers
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
        self.max_in_flight = int(config.max_in_flight)
        self.failures = FailureCount(
            {"env": config.max_env_errors, "malformed": config.max_malformed}
        )
        self.progress, self.n_shown = progress, n_shown
        self._told: set[str] = set()  # unknown keys that were named
        self._carried: list[list[Item]] = [[] for _ in self.drivers]
        self._loop = EventLoopThread(device)
        self._player: Player | None = None
        self._flight: Flight | None = None  # of training, where groups go on from step to step
        self._flying: Future[list[Group]] | None = None
        self._interrupted = False
        if engine is None:
            self.run(self.environment.close())  # nobody calls it here
            return
        settled = asyncio.Event()
        settled.set()
        try:
            self.run(engine.start(settled))
        except BaseException:
            self.close()
            raise
        limits = [limit for limit in (max_length, engine.context_length) if limit is not None]
        self._player = Player(
            engine,
            self.environment,
            tokenizer,
            seed=seed,
            max_turns=int(config.max_turns),
            max_length=min(limits, default=None),
            ends=ends,
            truncated=self.truncated,
            settled=settled,
        )

    @property
    def driver(self) -> int | None:
        """This rank's place among the drivers."""
        return self.drivers.index(self.rank) if self.rank in self.drivers else None

    @property
    def carried(self) -> list[Item]:
        """Prompts that were begun and whose answers are in no batch yet, the same on all ranks."""
        return [item for items in self._carried for item in items]

    def state_dict(self) -> dict[str, Any]:
        """Failures counted so far, and the groups that this rank carries to the next step, with
        all that is written of them."""
        flight = self._flight
        return {
            "env_errors": self.failures.of_run["env"],
            "malformed": self.failures.of_run["malformed"],
            "carried": [] if flight is None else self.run(flight.state_dict()),
        }

    def load_state_dict(self, states: list[dict[str, Any]], items: list[Item]) -> None:
        """Go on from what `state_dict` gave on all ranks of a run, on however many ranks.

        items: the prompts of all groups that were carried, rank by rank. Without
            `rollout.partial_rollout` there must be none.
        """
        self.failures.of_run = {"env": states[0]["env_errors"], "malformed": states[0]["malformed"]}
        groups = [group for state in states for group in state["carried"]]
        held = [0 for _ in self.drivers]
        self._carried = [[] for _ in self.drivers]
        own = []
        for group, item, owner in zip(groups, items, spread(held, len(items)), strict=True):
            self._carried[owner].append(item)
            if owner == self.driver:
                own.append(Group.from_state_dict(len(own), item, group))
        if own:
            self._flight = self._new_flight(True, self.responses_per_prompt[True])
            self.run(self._flight.resume(own))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine (of the engine, say) on the collector's event loop."""
        return self._loop.run(coroutine)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engines new weights: a collective where drawing the tensors is one, which a
        rank without an engine takes part in. Raises EngineError naming a parameter."""

        async def draw() -> None:
            for _ in named_tensors:
                pass

        update = self.engine.update_weights(named_tensors, version) if self.engine else draw()
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
        """Give up the rollout or evaluation that goes on, and every later one: on all ranks
        `collect` and `collect_step` raise Interrupted. May be called from any thread."""
        self._interrupted = True
        if (flying := self._flying) is not None:
            flying.cancel()

    def close(self) -> None:
        """Close the engine and the event loop, whatever runs there. May be called twice."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        try:
            loop.cancel()
            if self._flight is not None:
                loop.run(self._flight.abandon())
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
        """Answer and judge `items`, exactly these, the same list on every rank (a collective).

        items: dicts with `extra_info`, and `prompt` and `prompt_ids` where the environment's
            `reset` does not give them.
        sampled: in evaluation, by `train_sampling_params`; dumped under a name of its own.

        Returns (batch, metrics) on rank 0 and (None, {}) on the others. The batch holds the
        fields of `to_batch`; it is None in evaluation and when no sample is left to learn from.

        `rollout/env_errors` and `rollout/malformed` count the whole run so far.

        Raises EnvError when environments failed for more of the samples than
        `rollout.max_env_errors` allows, EngineError when an engine failed, or answered without
        sense more often than `rollout.max_malformed` allows, Interrupted after `interrupt`; on
        every rank.
        """
        left = iter(items)
        return self._collect(
            _Step(
                step,
                train,
                responses_per_prompt or self.responses_per_prompt[train],
                draw=lambda n: [item for _, item in zip(range(n), left, strict=False)],
                wanted=len(items),
                sampled=sampled,
            )
        )

    def collect_step(
        self, draw: Draw, n_prompts: int, step: int
    ) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        """A training batch of `n_prompts` groups, as far as the settings allow (a collective).

        With `rollout.dynamic_filtering` up to `rollout.max_resampled` further prompts take the
        place of those that teach nothing. With `rollout.partial_rollout` more prompts than needed
        are in flight; the step ends with the last group that it needs, and what is unfinished
        then goes on in the next.

        draw: `draw(n)` gives the next n prompts, the same on every rank; it is called by this
            thread or, while this thread waits, by the event loop's.

        Returns and raises as `collect`.
        """
        n_responses = self.responses_per_prompt[True]
        spare = 0
        if self.partial_rollout:
            spare = n_prompts // 2 if self.over_sampling is None else self.over_sampling
        return self._collect(
            _Step(
                step,
                True,
                n_responses,
                draw,
                wanted=n_prompts,
                spare=spare,
                budget=self.max_resampled if self._filters(n_responses) else 0,
                cut=self.partial_rollout,
            )
        )

    def _filters(self, n_responses: int) -> bool:
        # One answer to a prompt leaves nothing to compare.
        return self.dynamic_filtering and n_responses > 1

    def _collect(self, step: _Step) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        start = time.perf_counter()
        samples, n_resampled = self._answer(step)
        traffic = Traffic()
        table = SampleTable.of(samples, lines=self.rollouts_dir is not None)
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
            except OSError as error:  # the other ranks do not know of it: no time to raise
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
        metrics["rollout/tokens_per_s"] = int(good.samples["length"].sum()) / seconds
        if self.truncated == "mask":
            good = good.whole()
        if self._filters(step.n_responses):
            good, metrics["rollout/dynamic_filtering_ratio"] = good.without_equal_groups()
            metrics["rollout/resampled"] = float(n_resampled)
        if step.cut:
            metrics["rollout/unfinished"] = float(len(self.carried))
        return to_batch(good, step.n_responses), metrics

    def _answer(self, step: _Step) -> tuple[list[Sample], int]:
        """This rank's samples of a step, and how many prompts were drawn to replace others.

        The drivers answer in rounds; a second one is for the prompts that take the place of
        those that taught nothing. (A single driver draws them as it goes.) Every rank keeps the
        same books: what was drawn, who has it, what is left.
        """
        self.failures.begin(step.wanted * step.n_responses)
        flight = self._flight_of(step)
        try:
            return self._rounds(step, flight)
        except BaseException:
            self._carried = [[] for _ in self.drivers]
            if flight is not None and self._loop is not None:
                self.run(flight.abandon())
            raise

    def _rounds(self, step: _Step, flight: Flight | None) -> tuple[list[Sample], int]:
        carried = self._carried if step.cut else [[] for _ in self.drivers]
        held = [len(of_driver) for of_driver in carried]  # groups on each driver
        items: list[Item] = [item for of_driver in carried for item in of_driver]  # by position
        if step.cut and flight is not None:
            first = sum(held[: self.driver])
            for position, group in enumerate(flight.groups, start=first):
                group.renumber(position)
        samples: list[Sample] = []
        n_new = max(0, step.wanted + step.spare - len(items))
        missing, budget, n_resampled = step.wanted, step.budget, 0
        with self._bar(step) as bar:
            while True:
                drawn = step.draw(n_new)
                first, refilled = len(items), []
                items += drawn
                own = []
                for position, owner in enumerate(spread(held, len(drawn)), start=first):
                    held[owner] += 1
                    if owner == self.driver:
                        own.append(self._begin(step, position, items[position]))

                wanted = shares(held, missing)[self.driver or 0] if step.cut else missing
                fly = None
                if flight is not None and (own or wanted or not step.cut):
                    fly = partial(
                        flight.fly, own, wanted, cut=step.cut, progress=bar.update,
                        refill=self._refill(step, len(items), budget, refilled),
                    )  # fmt: skip
                groups, reports = self._round(fly, flight, refilled)
                samples += [sample for group in groups for sample in group.samples]
                n_refilled = sum(report.n_refilled for report in reports)
                items += refilled or step.draw(n_refilled)
                kept = [reports[rank].kept for rank in self.drivers]
                held = [len(positions) for positions in kept]
                missing -= sum(report.n_teach for report in reports)
                n_resampled += n_refilled
                budget -= n_refilled
                self.failures.draw(n_refilled * step.n_responses)
                n_new = max(0, min(budget, missing - sum(held)))
                if missing <= 0 or not (n_new or any(held)):
                    break
                n_resampled += n_new
                budget -= n_new
                self.failures.draw(n_new * step.n_responses)
        if step.cut:
            self._carried = [[items[position] for position in positions] for positions in kept]
        return samples, n_resampled

    def _refill(
        self, step: _Step, first: int, limit: int, refilled: list[Item]
    ) -> Callable[[], Group | None]:
        """For `Flight.fly`: what a single driver draws at once, several draw in the next round.

        first: position of the first one. limit: how many at most. refilled: filled with them.
        """

        def refill() -> Group | None:
            if len(self.drivers) > 1 or len(refilled) == limit:
                return None
            more = step.draw(1)
            if not more:
                return None
            refilled.extend(more)
            return self._begin(step, first + len(refilled) - 1, more[0])

        return refill

    @staticmethod
    def _begin(step: _Step, position: int, item: Item) -> Group:
        return Group.begin(position, item, step.n_responses, step.number)

    def _flight_of(self, step: _Step) -> Flight | None:
        """Where this rank's groups are, None if it does not drive an engine."""
        if self._player is None:
            return None
        if not step.cut:
            return self._new_flight(step.train, step.n_responses, step.train or step.sampled)
        if self._flight is None:
            self._flight = self._new_flight(step.train, step.n_responses)
        return self._flight

    def _new_flight(self, train: bool, n_responses: int, sampled: bool = True) -> Flight:
        sampling, player = self.sampling[sampled], self._player

        async def play(sample: Sample, item: Item, gate: Gate) -> None:
            await player.play(sample, item, sampling, gate, train=train)
            if sample.cause == "env":
                self._stop_if_too_many(flight)

        filtering = train and self._filters(n_responses)
        flight = Flight(play, self.engine, self.max_in_flight, filtering)
        return flight

    def _stop_if_too_many(self, flight: Flight) -> None:
        """Raise _TooManyFailures as soon as that is sure: if every call of an environment takes
        until its time limit, the end of the round may be hours away."""
        samples = [sample for group in flight.groups for sample in group.samples]
        failed = [Failure.of(sample) for sample in samples if sample.cause == "env"]
        if self.failures.exceeded("env", len(failed)):
            raise _TooManyFailures(failed)

    def _round(
        self,
        fly: Callable[[], Coroutine[Any, Any, list[Group]]] | None,
        flight: Flight | None,
        refilled: list[Item],
    ) -> tuple[list[Group], list[_Report]]:
        """This rank's groups of one round, and the reports of all ranks.

        The ranks tell each other about failures, so that all of them stop together.
        """
        groups, report, failure, failed = [], _Report(), None, []
        try:
            if fly is not None:
                groups = self._fly(fly())
            if flight is not None:
                report.n_teach = sum(group.teaches(flight.filtering) for group in groups)
                report.kept = [group.position for group in flight.groups]
        except _TooManyFailures as error:  # all ranks raise it, below
            failed = error.failed
        except Exception as error:  # engines may fail because their servers were asked to stop, too
            failure, report.failure = error, f"{type(error).__name__}: {error}"
        report.interrupted = self._interrupted
        report.n_refilled = len(refilled)
        samples = [sample for group in groups for sample in group.samples]
        report.failed = failed + [Failure.of(sample) for sample in samples if sample.error]
        report.unknown = list(self.environment.unknown)
        reports = [report]
        if self.n_ranks > 1:
            reports = [None] * self.n_ranks  # small objects; the samples go as tensors
            dist.all_gather_object(reports, report, group=self.group)
        self._tell(reports)
        if any(other.interrupted for other in reports):
            raise Interrupted("rollout: the run was asked to stop") from failure
        if failure is not None:
            raise failure
        for rank, other in enumerate(reports):
            if other.failure is not None:
                raise EngineError(f"rollout stopped because rank {rank} failed: {other.failure}")
        self.failures.count(failure for one in reports for failure in one.failed)
        return groups, reports

    def _fly(self, flight: Coroutine[Any, Any, list[Group]]) -> list[Group]:
        self._flying = self._loop.start(flight)
        if self._interrupted:
            self.interrupt()
        try:
            return self._loop.wait(self._flying)
        finally:
            self._flying = None

    def _tell(self, reports: list[_Report]) -> None:
        """Rank 0: name what was dropped, once for each kind, and keys that nobody reads."""
        if self.rank:
            return
        for line in lines(failure for report in reports for failure in report.failed):
            logger.warning("%s", line)
        unknown = {key: None for report in reports for key in report.unknown}
        if new := [key for key in unknown if key not in self._told]:
            logger.warning(
                "%s: step returned keys that nobody reads: %s",
                self.environment.path, hints(new),
            )  # fmt: skip
        self._told |= set(new)

    def _bar(self, step: _Step) -> tqdm:
        return tqdm(
            total=len(range(0, step.wanted, len(self.drivers))) * step.n_responses,
            desc=f"{'rollout' if step.train else 'evaluation'} {step.number}",
            unit="sample",
            leave=False,
            disable=True if self.rank else None if self.progress is None else not self.progress,
        )


def spread(held: list[int], n: int) -> list[int]:
    """Who gets each of n more groups: whoever has the fewest, the first among equals."""
    held = list(held)
    owners = []
    for _ in range(n):
        owner = held.index(min(held))
        held[owner] += 1
        owners.append(owner)
    return owners


def shares(held: list[int], n: int) -> list[int]:
    """How many of its groups each driver has to bring to an end, n in all: as evenly as what they
    hold allows."""
    left, share = list(held), [0] * len(held)
    for _ in range(min(n, sum(held))):
        owner = left.index(max(left))
        left[owner] -= 1
        share[owner] += 1
    return share
