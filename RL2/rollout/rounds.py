"""The rounds in which all drivers answer a step's prompts."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from tqdm import tqdm

from RL2.engines.protocol import SamplingParams
from RL2.environments.environment import Environment
from RL2.rollout.driver import Driver, TooManyFailures
from RL2.rollout.failures import Failure
from RL2.rollout.flight import GroupsInFlight
from RL2.rollout.reports import Report, Reports
from RL2.rollout.samples import Group, Sample
from RL2.rollout.shares import shares, spread
from RL2.rollout.step import Item, Step
from RL2.runtime.event_loop import EventLoopThread


class Rounds:
    """Answers the groups of a step.

    The drivers answer in rounds; later rounds are for prompts that replace those that taught
    nothing. (A single driver draws these at once.) All ranks keep the same records: which prompts
    were drawn, which driver has them, how many are left.

    Args:
        driver: this rank's driver, None if it has no engine.
        drivers: the ranks that have a driver.
        loop: the event loop that the driver runs on.
        reports: exchanges the ranks' reports.
        environment: this rank's environment.
        progress: whether to show a progress bar; None shows it on a terminal.
    """

    def __init__(
        self,
        driver: Driver | None,
        drivers: tuple[int, ...],
        loop: EventLoopThread,
        reports: Reports,
        environment: Environment,
        progress: bool | None,
    ):
        self._driver, self._drivers = driver, drivers
        self._loop, self._reports, self._environment = loop, reports, environment
        self._progress = progress
        self._carried: list[list[Item]] = [[] for _ in drivers]
        self._answering: Future[list[Group]] | None = None
        self._interrupted = self._closed = False

    @property
    def carried(self) -> list[Item]:
        """Prompts that were begun and are in no batch yet, the same on all ranks."""
        return [item for items in self._carried for item in items]

    def state_dict(self) -> list[dict[str, Any]]:
        """The groups that this rank carries to the next step, with everything written so far."""
        if self._driver is None or self._driver.carried is None:
            return []
        return self._loop.run(self._driver.carried.state_dict())

    def load_state_dict(
        self,
        groups: list[dict[str, Any]],
        items: list[Item],
        sampling: SamplingParams,
        filtering: bool,
    ) -> None:
        """Carry the groups that `state_dict` returned on all ranks; the number of ranks may differ.

        items: the prompts of the groups.
        """
        held = [0 for _ in self._drivers]
        self._carried = [[] for _ in self._drivers]
        own = []
        for group, item, owner in zip(groups, items, spread(held, len(items)), strict=True):
            self._carried[owner].append(item)
            if owner == self._place:
                own.append(Group.from_state_dict(len(own), item, group))
        if own:
            self._driver.carried = self._driver.new_groups(True, sampling, filtering)
            self._loop.run(self._driver.carried.take_over(own))

    def answer(self, step: Step) -> tuple[list[Sample], int]:
        """This rank's samples of a step, and the number of prompts drawn to replace others (a
        collective)."""
        self._reports.failures.begin(step.wanted * step.n_responses)
        in_flight = None if self._driver is None else self._driver.groups_of(step)
        try:
            return self._play_rounds(step, in_flight)
        except BaseException:
            self._carried = [[] for _ in self._drivers]
            if in_flight is not None and not self._closed:
                self._loop.run(in_flight.cancel())
            raise

    def interrupt(self) -> None:
        """See `Collector.interrupt`."""
        self._interrupted = True
        if (answering := self._answering) is not None:
            answering.cancel()

    def close(self) -> None:
        """Stop the running round and drop the carried groups."""
        self._closed = True
        self._loop.cancel()
        if self._driver is not None and self._driver.carried is not None:
            self._loop.run(self._driver.carried.cancel())

    @property
    def _place(self) -> int | None:
        """This rank's place among the drivers."""
        return None if self._driver is None else self._drivers.index(self._reports.rank)

    def _play_rounds(
        self, step: Step, in_flight: GroupsInFlight | None
    ) -> tuple[list[Sample], int]:
        carried = self._carried if step.carries else [[] for _ in self._drivers]
        held = [len(of_driver) for of_driver in carried]  # groups on each driver
        items: list[Item] = [item for of_driver in carried for item in of_driver]  # by position
        if step.carries and in_flight is not None:
            first = sum(held[: self._place])
            for position, group in enumerate(in_flight.groups, start=first):
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
                    if owner == self._place:
                        own.append(step.new_group(position, items[position]))

                wanted = shares(held, missing)[self._place or 0] if step.carries else missing
                answer = None
                if in_flight is not None and (own or wanted or not step.carries):
                    answer = partial(
                        in_flight.answer, own, wanted, carries=step.carries, progress=bar.update,
                        refill=self._refill(step, len(items), budget, refilled),
                    )  # fmt: skip
                groups, reports = self._play_round(answer, in_flight, refilled)
                samples += [sample for group in groups for sample in group.samples]
                n_refilled = sum(report.n_refilled for report in reports)
                items += refilled or step.draw(n_refilled)
                kept = [reports[rank].kept for rank in self._drivers]
                held = [len(positions) for positions in kept]
                missing -= sum(report.n_teach for report in reports)
                n_resampled += n_refilled
                budget -= n_refilled
                self._reports.failures.draw(n_refilled * step.n_responses)
                n_new = max(0, min(budget, missing - sum(held)))
                if missing <= 0 or not (n_new or any(held)):
                    break
                n_resampled += n_new
                budget -= n_new
                self._reports.failures.draw(n_new * step.n_responses)
        if step.carries:
            self._carried = [[items[position] for position in positions] for positions in kept]
        return samples, n_resampled

    def _refill(
        self, step: Step, first: int, limit: int, refilled: list[Item]
    ) -> Callable[[], Group | None]:
        """For `GroupsInFlight.answer`: a single driver draws replacements at once; several drivers
        draw them in the next round.

        first: position of the first replacement. limit: most replacements. refilled: collects them.
        """

        def refill() -> Group | None:
            if len(self._drivers) > 1 or len(refilled) == limit:
                return None
            more = step.draw(1)
            if not more:
                return None
            refilled.extend(more)
            return step.new_group(first + len(refilled) - 1, more[0])

        return refill

    def _play_round(
        self,
        answer: Callable[[], Coroutine[Any, Any, list[Group]]] | None,
        in_flight: GroupsInFlight | None,
        refilled: list[Item],
    ) -> tuple[list[Group], list[Report]]:
        """This rank's groups of one round, and the reports of all ranks.

        The ranks tell each other about failures, so that all of them stop together.
        """
        groups, report, failure, failed = [], Report(), None, []
        try:
            if answer is not None:
                groups = self._interruptibly(answer())
            if in_flight is not None:
                report.n_teach = sum(group.teaches(in_flight.filtering) for group in groups)
                report.kept = [group.position for group in in_flight.groups]
        except TooManyFailures as error:  # raised on all ranks below
            failed = error.failed
        except Exception as error:  # e.g. because servers were asked to stop, too
            failure, report.failure = error, f"{type(error).__name__}: {error}"
        report.interrupted = self._interrupted
        report.n_refilled = len(refilled)
        samples = [sample for group in groups for sample in group.samples]
        report.failed = failed + [Failure.of(sample) for sample in samples if sample.error]
        report.unknown = list(self._environment.unknown)
        return groups, self._reports.exchange(report, failure)

    def _interruptibly(self, answer: Coroutine[Any, Any, list[Group]]) -> list[Group]:
        """Wait for the groups; `interrupt` cancels it."""
        self._answering = self._loop.start(answer)
        if self._interrupted:
            self.interrupt()
        try:
            return self._loop.wait(self._answering)
        finally:
            self._answering = None

    def _bar(self, step: Step) -> tqdm:
        shown = self._reports.rank == 0 and self._progress is not False
        return tqdm(
            total=len(range(0, step.wanted, len(self._drivers))) * step.n_responses,
            desc=f"{'rollout' if step.train else 'evaluation'} {step.number}",
            unit="sample",
            leave=False,
            # None: tqdm shows the bar only on a terminal
            disable=None if shown and self._progress is None else not shown,
        )
