"""Reports that the ranks exchange after each round of a rollout, so that all stop together."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch.distributed as dist

from RL2.environments.source import hints
from RL2.rollout.failures import Failure, FailureCount, lines
from RL2.runtime.errors import EngineError, Interrupted

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """The report of one rank.

    n_teach: number of groups for the batch. kept: positions of the groups that stay in flight, in
    order. n_refilled: number of prompts that it drew by itself. failed: failures of samples.
    unknown: unknown keys of the environment's answers. failure: error of the rank itself.
    """

    n_teach: int = 0
    kept: list[int] = field(default_factory=list)
    n_refilled: int = 0
    failed: list[Failure] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    failure: str | None = None
    interrupted: bool = False


class Reports:
    """Exchanges the reports of all ranks.

    failures: counts the failed samples of all ranks. env_path: the environment's file, for
    messages. rank, n_ranks: rank and size in `group`, which supports CPU tensors; None is the
    default process group.
    """

    def __init__(
        self,
        failures: FailureCount,
        env_path: str,
        rank: int,
        n_ranks: int,
        group: dist.ProcessGroup | None,
    ):
        self.failures, self.env_path = failures, env_path
        self.rank, self.n_ranks, self.group = rank, n_ranks, group
        self._warned_of: set[str] = set()  # unknown keys

    def exchange(self, own: Report, failure: Exception | None) -> list[Report]:
        """All ranks' reports, by rank (a collective). Rank 0 warns about dropped samples.

        failure: why this rank's round failed.

        Raises the same kind of error on all ranks: Interrupted, a rank's failure, or what
        `FailureCount.count` raises.
        """
        reports = [own]
        if self.n_ranks > 1:
            reports = [None] * self.n_ranks  # small objects; the samples go as tensors
            dist.all_gather_object(reports, own, group=self.group)
        if self.rank == 0:
            self._warn(reports)
        if any(report.interrupted for report in reports):
            raise Interrupted("rollout: the run was asked to stop") from failure
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report.failure is not None:
                raise EngineError(f"rollout stopped because rank {rank} failed: {report.failure}")
        self.failures.count(failed for report in reports for failed in report.failed)
        return reports

    def _warn(self, reports: list[Report]) -> None:
        """Log dropped samples, one line for each kind of failure, and new unknown keys."""
        for line in lines(failed for report in reports for failed in report.failed):
            logger.warning("%s", line)
        unknown = {key: None for report in reports for key in report.unknown}
        if new := [key for key in unknown if key not in self._warned_of]:
            logger.warning(
                "%s: step returned keys that are not used: %s", self.env_path, hints(new)
            )
        self._warned_of |= set(new)
