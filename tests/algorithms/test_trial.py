"""A loss that cannot train is found by its trial, with the line that is to blame."""

import pytest

from RL2.algorithms import LOSSES, resolve_loss
from RL2.config import ConfigError

SURE = [
    (
        "def f(logps): return -logps.log()",
        "on three ordinary tokens, its losses are [nan, nan, nan] (my_loss.py:4, log)",
    ),
    ("def f(logps, advantages): return -advantages.sqrt() * logps", "(my_loss.py:4, sqrt)"),
    ("def f(logps, rewards):\n    w = torch.log(rewards)\n    return w * logps", "y:5, log)"),
    ("def f(logps, rewards):\n    return logps / rewards", "(my_loss.py:5, div)"),
    # The old policy is the new one in the first update of every rollout.
    (
        "def f(logps, old_logps): return (logps - old_logps) / (logps - old_logps).abs()",
        "on three ordinary tokens of a policy that was not updated since, its losses are [nan, "
        "nan, nan] (my_loss.py:4, div)",
    ),
    # Finite itself, but not its gradient.
    (
        "def f(logps, old_logps):\n    return (logps - old_logps).abs().sqrt()",
        "its gradient for logps is [nan, nan, nan] (my_loss.py:4)",
    ),
    (
        "def f(logps):\n    if len(logps): return logps / torch.nonsense",
        "AttributeError: module 'torch' has no attribute 'nonsense' (my_loss.py:5)",
    ),
]
POSSIBLE = [
    (
        "def f(logps, advantages):\n    return -advantages / advantages.abs() * logps",
        "on tokens without reward or advantage, its losses are [nan, nan, nan] (my_loss.py:5, d",
    ),
    (
        "def f(logps, log1mps): return log1mps - logps",
        "probabilities of 0.999999, 1e-12 and exactly 1, its losses are [-13.8, 27.6, -inf] (my_l",
    ),
    ("def f(logps):\n    return (-20 * logps).exp()", "are [1, inf, 1] (my_loss.py:5, exp);"),
    (
        "def f(logps):\n    assert (logps > -9).all()\n    return -logps",
        "exactly 1, a trial raised AssertionError:  (my_loss.py:5);",
    ),
]


def resolved(tmp_path, body):
    file = tmp_path / "my_loss.py"
    file.write_text(f"import torch\n\n\n{body}\n")
    return resolve_loss({"name": None, "import_path": f"{file}:f"})


@pytest.mark.parametrize(("body", "said"), SURE)
def test_what_every_run_meets_is_an_error_with_its_line(tmp_path, body, said):
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, body)
    assert str(caught.value).startswith(f"actor.loss.import_path={tmp_path}/my_loss.py:f: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(("body", "said"), POSSIBLE)
def test_what_some_runs_meet_is_a_warning(tmp_path, body, said, caplog):
    resolved(tmp_path, body)
    (line,) = caplog.messages
    assert said in line


@pytest.mark.parametrize("name", LOSSES)
def test_our_own_losses_stand_the_trial(name, caplog):
    resolve_loss({"name": name, "max_rank": 8 if name == "rank_jsd" else None})
    assert caplog.messages == []


def test_infinities_that_are_masked_are_no_fault(tmp_path, caplog):
    resolved(tmp_path, "def f(logps, rewards):\n"
             "    return torch.where(rewards > 0, rewards.log(), 0.0) * logps")  # fmt: skip
    assert caplog.messages == []
