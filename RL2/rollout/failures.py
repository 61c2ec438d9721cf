"""Samples that failed: how many a step may lose, and what is said of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from RL2.rollout.samples import Sample
from RL2.runtime.errors import EngineError, EnvError

# What differs from sample to sample in one and the same failure: addresses, numbers, quoted text.
_VARIES = re.compile(r"0x[0-9a-fA-F]+|'[^']*'|\"[^\"]*\"|(?<!\.py:)\b\d+(\.\d+)?")
_FEW = 1  # a share allows so many at least: a small step does not end by one failure
# By cause: the key that bounds it, the error, and what happened to the samples.
_CAUSES = {
    "env": ("max_env_errors", EnvError, "the environment failed for"),
    "malformed": ("max_malformed", EngineError, "the engine answered without sense for"),
}


@dataclass(frozen=True)
class Failure:
    """Why a sample counts for nothing.

    cause: as in `Sample`. born: step and place in it of the prompt.
    """

    cause: str | None
    born: tuple[int, int]
    response: int
    error: str

    @classmethod
    def of(cls, sample: Sample) -> Failure:
        return cls(sample.cause, sample.born, sample.response, sample.error)


def too_many(n_failed: int, bound: float | None, n_samples: int) -> bool:
    """Whether more samples of a step failed than `bound` allows.

    bound: below 1 a share of the step's samples, from 1 on their number; 0 allows none, None all.
    """
    if bound is None:
        return False
    return n_failed > (max(_FEW, bound * n_samples) if 0 < bound < 1 else bound)


class FailureCount:
    """Failures by cause, of the run and of the step at hand, and whether they are too many.

    bounds: `rollout.max_env_errors` and `max_malformed`, by cause.
    """

    def __init__(self, bounds: dict[str, float | None]):
        self.bounds = bounds
        self.of_run = dict.fromkeys(_CAUSES, 0)
        self._of_step, self._n_samples = dict.fromkeys(_CAUSES, 0), 0

    def begin(self, n_samples: int) -> None:
        """A step begins, for which so many samples are asked."""
        self._of_step, self._n_samples = dict.fromkeys(_CAUSES, 0), n_samples

    def draw(self, n_samples: int) -> None:
        """So many more are asked for."""
        self._n_samples += n_samples

    def exceeded(self, cause: str, n_more: int = 0) -> bool:
        """Whether the step has lost too many, `n_more` included that are not counted yet."""
        return too_many(self._of_step[cause] + n_more, self.bounds[cause], self._n_samples)

    def count(self, failures: Iterable[Failure]) -> None:
        """Raises EnvError or EngineError where they are too many."""
        last: dict[str, Failure] = {}
        for failure in failures:
            if failure.cause in _CAUSES:
                last[failure.cause] = failure
                self.of_run[failure.cause] += 1
                self._of_step[failure.cause] += 1
        for cause, failure in last.items():
            if self.exceeded(cause):
                key, error, what = _CAUSES[cause]
                raise error(
                    f"rollout.{key}={self.bounds[cause]:g}: {what} {self._of_step[cause]} of "
                    f"{self._n_samples} samples of a step; last: {failure.error}"
                )


def lines(failures: Iterable[Failure]) -> list[str]:
    """One line for each kind of failure, with how many samples it took."""
    kinds: dict[str, list[Failure]] = {}
    for failure in failures:
        kinds.setdefault(_VARIES.sub("#", failure.error), []).append(failure)
    return [_line(them) for them in kinds.values()]


def _line(failures: list[Failure]) -> str:
    first = min(failures, key=lambda one: (one.born, one.response))
    step, prompt = first.born
    n = len(failures)
    what = "sample dropped" if n == 1 else f"{n} samples dropped, the first of them"
    return f"{what}: prompt {prompt}, response {first.response} of step {step}: {first.error}"
