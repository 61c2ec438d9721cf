"""Groups in flight on one driver: started, judged when complete, and carried to the next step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from RL2.engines.protocol import Engine
from RL2.rollout.player import Gate
from RL2.rollout.samples import Group, Sample

Play = Callable[[Sample, dict[str, Any], Gate], Coroutine[Any, Any, None]]
JudgeGroup = Callable[[Group, Gate], Coroutine[Any, Any, None]]


class GroupsInFlight:
    """The groups that one driver answers. All of its methods run on one event loop.

    play: plays one sample to its end. engine: gets the samples' requests.
    limit: most requests at a time.
    filtering: whether groups with equal rewards teach nothing.
    judge: called with a group when all of its samples have ended; None for no judges.
    """

    def __init__(
        self,
        play: Play,
        engine: Engine,
        limit: int,
        filtering: bool = False,
        judge: JudgeGroup | None = None,
    ):
        self.play = play
        self.judge = judge
        self.engine = engine
        self.gate = Gate(limit)
        self.filtering = filtering
        self._open: list[Group] = []
        self._complete: list[Group] = []
        self._tasks: dict[asyncio.Task, Group] = {}
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None
        self._progress: Callable[[], object] = lambda: None

    @property
    def groups(self) -> list[Group]:
        """All groups, by position."""
        return sorted(self._complete + self._open, key=lambda group: group.position)

    async def answer(
        self,
        groups: Iterable[Group],
        wanted: int,
        *,
        carries: bool = False,
        refill: Callable[[], Group | None] = lambda: None,
        progress: Callable[[], object] = lambda: None,
    ) -> list[Group]:
        """Answer new and carried groups; returns the groups for the step.

        wanted: number of groups that must teach something. Without `carries` all groups are
            finished.
        carries: stop as soon as `wanted` is reached. The rest stays here: samples in the engine are
            aborted, keep what is written and wait for the next `answer`; those in an environment go
            on there.
        refill: called for more groups, until it has none, as soon as `wanted` cannot be reached
            because finished groups teach nothing.
        progress: called once for each sample that ends.

        A failure of the engine ends all groups and is raised.
        """
        self._progress = progress
        try:
            self.gate.open()  # before new groups start, so that carried ones come first
            for group in groups:
                self._start(group)
            n_seen = n_teach = 0
            while True:
                self._raise_failure()
                fresh = self._complete[n_seen:]
                n_seen += len(fresh)
                n_teach += sum(group.teaches(self.filtering) for group in fresh)
                while n_teach + len(self._open) < wanted and (more := refill()) is not None:
                    self._start(more)
                if not self._open or (carries and n_teach >= wanted):
                    break
                self._ended.clear()
                await self._ended.wait()
            if self._open:
                await self.gate.drain(self.engine)
                self._raise_failure()
        except BaseException:
            await self.cancel()
            raise
        finally:
            self._progress = lambda: None
        return self._take_complete(wanted if carries else None)

    async def take_over(self, groups: Iterable[Group]) -> None:
        """Take groups that were carried elsewhere, for the next `answer`."""
        self.gate.close()
        for group in groups:
            self._start(group)

    async def state_dict(self) -> list[dict[str, Any]]:
        """State of all groups, by position."""
        return [group.state_dict() for group in self.groups]

    async def cancel(self) -> None:
        """Stop all samples and drop the groups."""
        tasks, self._tasks = list(self._tasks), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._complete, self._open, self._failure = [], [], None

    def _start(self, group: Group) -> None:
        left = [sample for sample in group.samples if not sample.ended]
        self._open.append(group)
        if not left:
            self._finish(group)
        for sample in left:
            task = asyncio.create_task(self.play(sample, group.item, self.gate))
            self._tasks[task] = group
            group.unfinished += 1
            task.add_done_callback(self._sample_ended)

    def _sample_ended(self, task: asyncio.Task) -> None:
        group = self._tasks.pop(task, None)
        if group is None or task.cancelled():
            return  # cancelled with all others
        if task.exception() is not None:
            self._failure = self._failure or task.exception()
            self._ended.set()
            return
        self._progress()
        group.unfinished -= 1
        if not group.unfinished:
            self._finish(group)

    def _finish(self, group: Group) -> None:
        """All samples have ended: judge the group, unless that is done, and then complete it."""
        if self.judge is None or group.judged:
            self._open.remove(group)
            self._complete.append(group)
            self._ended.set()
            return
        task = asyncio.create_task(self.judge(group, self.gate))
        self._tasks[task] = group
        task.add_done_callback(self._group_judged)

    def _group_judged(self, task: asyncio.Task) -> None:
        group = self._tasks.pop(task, None)
        if group is None or task.cancelled():
            return  # cancelled with all others
        if task.exception() is None:
            self._finish(group)
            return
        self._failure = self._failure or task.exception()
        self._ended.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _take_complete(self, wanted: int | None) -> list[Group]:
        """Remove and return complete groups: all, or the first `wanted` that teach something and
        those that teach nothing."""
        taken, kept, n_teach = [], [], 0
        for group in sorted(self._complete, key=lambda group: group.position):
            teaches = group.teaches(self.filtering)
            if teaches and wanted is not None and n_teach >= wanted:
                kept.append(group)
                continue
            n_teach += teaches
            taken.append(group)
        self._complete = kept
        return taken
