"""The part of a rank with an engine: it plays samples, and keeps the groups that continue."""

from __future__ import annotations

from RL2.engines.protocol import SamplingParams
from RL2.rollout.failures import Failure, FailureCount
from RL2.rollout.flight import GroupsInFlight
from RL2.rollout.judges.judge import Judge, judge_group
from RL2.rollout.player import Gate, Player
from RL2.rollout.samples import Group, Sample
from RL2.rollout.step import Item, Step


class TooManyFailures(Exception):
    """Environments failed more often in this step than `rollout.max_env_errors` allows. failed:
    failures of this round."""

    def __init__(self, failed: list[Failure]):
        super().__init__(failed)
        self.failed = failed


class Driver:
    """Plays one engine's samples.

    player: plays single samples. max_in_flight: most requests at a time. failures: the failures
    counted so far. judges: judges of training groups.
    carried: the groups that continue from step to step; None before there are any.
    """

    def __init__(
        self,
        player: Player,
        max_in_flight: int,
        failures: FailureCount,
        judges: tuple[Judge, ...] = (),
    ):
        self.player = player
        self.judges = judges
        self.max_in_flight = max_in_flight
        self.failures = failures
        self.carried: GroupsInFlight | None = None

    def groups_of(self, step: Step) -> GroupsInFlight:
        """What plays a step's groups; it holds the groups carried over from the last step."""
        if not step.carries:
            return self.new_groups(step.train, step.sampling, step.filtering)
        if self.carried is None:
            self.carried = self.new_groups(True, step.sampling, step.filtering)
        return self.carried

    def new_groups(self, train: bool, sampling: SamplingParams, filtering: bool) -> GroupsInFlight:
        async def play(sample: Sample, item: Item, gate: Gate) -> None:
            await self.player.play(sample, item, sampling, gate, train=train)
            if sample.cause == "env":
                self._stop_if_too_many(groups)

        async def judge(group: Group, gate: Gate) -> None:
            await judge_group(group, self.judges, self.player, gate, sampling)
            if any(sample.cause == "env" for sample in group.samples):
                self._stop_if_too_many(groups)

        judged = judge if train and self.judges else None
        groups = GroupsInFlight(play, self.player.engine, self.max_in_flight, filtering, judged)
        return groups

    def _stop_if_too_many(self, groups: GroupsInFlight) -> None:
        """Raise TooManyFailures as soon as it is certain: if every call of an environment runs into
        its time limit, the round may take hours to end."""
        samples = [sample for group in groups.groups for sample in group.samples]
        failed = [Failure.of(sample) for sample in samples if sample.cause == "env"]
        if self.failures.exceeded("env", len(failed)):
            raise TooManyFailures(failed)
