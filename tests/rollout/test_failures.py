"""How many failures a step may have, and one line for those that are equal."""

import pytest

from RL2.rollout.failures import Failure, FailureCount, lines, too_many
from RL2.runtime.errors import EngineError, EnvError

REFUSED = "env.py: step raised ConnectionError: <Session object at 0x7f{:x}> port {} (env.py:{})"


def failures(n, cause="env", error="env.py: step raised KeyError: 'a' (env.py:3)"):
    return [Failure(cause, (5, i // 4), i % 4, error) for i in range(n)]


@pytest.mark.parametrize(
    ("bound", "n_samples", "allowed"),
    [
        (0.5, 64, 32),
        (0.5, 7, 3),
        (0.5, 2, 1),
        (0.5, 1, 1),
        (0.01, 8, 1),  # a small step does not end by one failure
        (0.0, 64, 0),
        (1, 64, 1),  # from 1 on a number
        (16, 8, 16),
        (16, 512, 16),
    ],
)
def test_what_a_step_may_lose(bound, n_samples, allowed):
    assert not too_many(allowed, bound, n_samples)
    assert too_many(allowed + 1, bound, n_samples)


def test_null_allows_everything():
    assert not too_many(10**9, None, 1)


@pytest.mark.parametrize(
    ("cause", "error", "key"),
    [("env", EnvError, "max_env_errors"), ("malformed", EngineError, "max_malformed")],
)
def test_a_step_begins_to_count_anew_and_the_run_goes_on(cause, error, key):
    count = FailureCount({"env": 0.5, "malformed": 0.5})
    for step in (1, 2, 3):
        count.begin(8)
        count.count(failures(3, cause))
        count.count(failures(1, cause))
        assert count.of_run[cause] == 4 * step
    assert count.exceeded(cause, 1)
    count.draw(2)  # resampled
    assert not count.exceeded(cause, 1)
    with pytest.raises(error) as caught:
        count.count(failures(2, cause))
    said = str(caught.value)
    assert said.startswith(f"rollout.{key}=0.5: ") and "6 of 10 samples" in said
    assert said.endswith("last: env.py: step raised KeyError: 'a' (env.py:3)")


def test_equal_failures_are_one_line():
    down = [
        Failure("env", (5, i // 4), i % 4, REFUSED.format(i, 40000 + i, 12))
        for i in range(31, -1, -1)
    ]
    other_line = Failure("env", (5, 9), 0, REFUSED.format(1, 1, 13))
    malformed = failures(1, "malformed", "the engine returned no token")
    said = lines([*down, other_line, *malformed])
    assert len(said) == 3
    assert said[0] == (
        "32 samples dropped, the first of them: prompt 0, response 0 of step 5: "
        + REFUSED.format(0, 40000, 12)
    )
    assert said[1].startswith("sample dropped: prompt 9, ")
    assert said[2].endswith("the engine returned no token")
    assert lines([]) == []
