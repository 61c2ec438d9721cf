"""Samples that failed: how many a step may lose, and the messages about them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from RL2.rollout.samples import Sample
from RL2.runtime.errors import EngineError, EnvError

# Parts that differ between samples with the same failure: addresses, numbers, quoted text.
_VARIES = re.compile(r"0x[0-9a-fA-F]+|'[^']*'|\"[^\"]*\"|(?<!\.py:)\b\d+(\.\d+)?")
_FEW = 1  # least number that a share allows: one failure must not end a small step
# By cause: the key of the limit, the error, and what happened to the samples.
_CAUSES = {
    "env": ("max_env_errors", EnvError, "the environment failed for"),
    "malformed": ("max_malformed", EngineError, "the engine's replies made no sense for"),
}


@dataclass(frozen=True)
class Failure:
    """Why a sample failed.

    cause: as in `Sample`. born: the prompt's step and its place there.
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

    bound: below 1 a share of the step's samples, from 1 on a number; 0 allows none, None all.
    """
    if bound is None:
        return False
    return n_failed > (max(_FEW, bound * n_samples) if 0 < bound < 1 else bound)


class FailureCount:
    """Counts failures by cause, in the run and in the current step, and limits them.

    bounds: `rollout.max_env_errors` and `max_malformed`, by cause.
    """

    def __init__(self, bounds: dict[str, float | None]):
        self.bounds = bounds
        self.of_run = dict.fromkeys(_CAUSES, 0)
        self._of_step, self._n_samples = dict.fromkeys(_CAUSES, 0), 0

    def begin(self, n_samples: int) -> None:
        """Begin a step with `n_samples` samples."""
        self._of_step, self._n_samples = dict.fromkeys(_CAUSES, 0), n_samples

    def draw(self, n_samples: int) -> None:
        """Add `n_samples` samples to the step."""
        self._n_samples += n_samples

    def exceeded(self, cause: str, n_more: int = 0) -> bool:
        """Whether the step has too many failures, including `n_more` that are not counted yet."""
        return too_many(self._of_step[cause] + n_more, self.bounds[cause], self._n_samples)

    def count(self, failures: Iterable[Failure]) -> None:
        """Count failures. Raises EnvError or EngineError if there are too many."""
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
    """One line for each kind of failure, with the number of samples."""
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
