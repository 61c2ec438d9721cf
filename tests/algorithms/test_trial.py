"""A loss that cannot train is found by its trial, with the line that is to blame."""

import os
import random
import signal

import pytest
import torch

from RL2.algorithms import LOSSES, resolve_loss
from RL2.runtime.errors import ConfigError
from tests.ranks import run_on_ranks

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
SURE += [
    ("def f(logps):\n    exit(0)", "it raised SystemExit: 0 (my_loss.py:5)"),
    ("def f(logps): return -logps, {'loss': logps}", "its metric loss has the name of one that "),
    ("def f(logps): return -logps, {1: logps}", "its metric 1 has no name; use text as the key"),
    ("def f(logps): return -logps, {'x': logps.to(torch.complex64)}", "came back as complex64"),
    ("def f(logps): return -logps.bfloat16()", "losses of 3 tokens came back as bfloat16"),
    ("def f(logps): return -logps, None", "it returned (Tensor, NoneType); return the losses, or"),
    ("def f(logps): return [-logps]", "losses of 3 tokens came back as list"),
    (
        "def f(logps):\n    torch.set_grad_enabled(False)\n    return -logps",
        "it called torch.set_grad_enabled, which changes the whole run; leave that out",
    ),
    (
        "def f(logps):\n    torch.manual_seed(0)\n    return -logps * torch.rand(len(logps))",
        "it seeds torch's random numbers, which the whole run draws from",
    ),
    (
        "def f(logps, rewards):\n    rewards.clamp_(max=1)\n    return -logps * rewards",
        "it changed rewards in place, which others read; use rewards.clone()",
    ),
]
SURE += [
    (
        "import os\ndef f(logps):\n    os.chdir(os.sep)\n    return -logps",
        "it called os.chdir, which changes the whole run; leave that out",
    ),
    (
        "n = []\ndef f(logps):\n    n.append(0)\n    return -logps if len(n) < 3 else None",
        "on three ordinary tokens, losses of 3 tokens came back as NoneType",
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
        "def f(logps): return -logps * torch.rand_like(logps)",
        "f: draws random numbers, so that results depend on actor.max_length_per_device and on",
    ),
    (
        "def f(logps): return logps.mean() - logps",
        "f: the loss of a token depends on the others that it is called with, which are some of",
    ),
    (
        "def f(logps): return -logps.squeeze()",
        "f: on one token alone, losses of 1 tokens came back as [], expected a tensor [1]",
    ),
    (
        "def f(logps):\n    assert (logps > -9).all()\n    return -logps",
        "exactly 1, it raised AssertionError (my_loss.py:5);",
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


NEVER_WARNED_OF = [
    "def f(logps): return torch.where(logps > -1, logps.exp(), -logps)",
    "def f(logps, rewards):\n"
    "    return -logps * rewards if rewards.any() else torch.zeros_like(logps)",
    "def f(logps): return -logps, {'often': logps > -1, 'x': logps.double()}",
    "def f(logps):\n    (x := -logps).register_hook(lambda g: 2 * g)\n    return x",
]


@pytest.mark.parametrize("body", NEVER_WARNED_OF)
def test_a_loss_of_its_own_token_is_tried_in_silence(tmp_path, body, caplog):
    before = torch.get_rng_state()
    resolved(tmp_path, body)
    assert caplog.messages == [] and torch.equal(before, torch.get_rng_state())


def test_a_trial_leaves_the_random_numbers_where_they_were(tmp_path):
    before = torch.get_rng_state()
    assert resolved(tmp_path, "def f(logps): return -logps * torch.rand_like(logps)").draws
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("path", ["torch:relu", "torch:add"])
def test_a_function_without_a_signature_is_refused_in_one_line(path):
    with pytest.raises(ConfigError, match=f"^actor.loss.import_path={path}: "):
        resolve_loss({"name": None, "import_path": path})


@pytest.mark.parametrize("line", ["raise KeyboardInterrupt", "raise GeneratorExit", "exit()"])
def test_a_file_that_ends_python_is_refused_in_one_line(tmp_path, line):
    with pytest.raises(ConfigError, match=r"importing .* \(my_loss.py:4\); make it importable"):
        resolved(tmp_path, line)


def test_an_interrupt_is_a_fault_unless_it_is_ctrl_c(tmp_path):
    body = "def f(logps):\n    raise KeyboardInterrupt"
    with pytest.raises(KeyboardInterrupt):
        resolved(tmp_path, body)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # as a run has it
    try:
        with pytest.raises(ConfigError, match=r"it raised KeyboardInterrupt \(my_loss.py:5\)"):
            resolved(tmp_path, body)
    finally:
        signal.signal(signal.SIGINT, before)


AT_IMPORT = {
    "os.chdir": "os.chdir(os.sep)",
    "torch.set_grad_enabled": "torch.set_grad_enabled(False)",
    "torch.set_default_dtype": "torch.set_default_dtype(torch.float64)",
    "torch.set_default_device": "torch.set_default_device('meta')",
    "torch.set_num_threads": "torch.set_num_threads(1 + torch.get_num_threads())",
}


@pytest.mark.parametrize("name", AT_IMPORT)
def test_what_the_import_of_a_loss_changes_of_the_run_is_put_back(name, tmp_path):
    before = os.getcwd(), torch.get_default_dtype(), torch.get_num_threads()
    text = f"import os, torch\n{AT_IMPORT[name]}\ndef f(logps): return -logps"
    with pytest.raises(ConfigError, match=f"importing .*, it called {name}, which changes"):
        resolved(tmp_path, text)
    assert before == (os.getcwd(), torch.get_default_dtype(), torch.get_num_threads())
    assert torch.is_grad_enabled() and torch.zeros(1).device.type == "cpu"


def test_handlers_and_seeds_of_an_import_are_put_back(tmp_path):
    """They may come from what it imports."""
    handler = signal.getsignal(signal.SIGTERM)
    states = torch.get_rng_state(), random.getstate()
    seeds = "torch.manual_seed(7); random.seed(7); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    text = f"import random, signal, torch\n{seeds}\ndef f(logps): return -logps"
    resolved(tmp_path, text)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


@pytest.mark.parametrize(
    "body, keeps",
    [
        ("kept.append(logps)", True),
        ("kept.append((-logps).mean())", True),
        ("kept.append(logps.detach().mean().item())", False),
        ("kept[:] = [logps]", False),
    ],
)
def test_a_loss_that_keeps_tensors_is_told_so(body, keeps, tmp_path, caplog):
    resolved(tmp_path, f"kept = []\ndef f(logps):\n    {body}\n    return -logps")
    assert ("keeps tensors of each call" in caplog.text) is keeps


@pytest.mark.parametrize("draw", ["random.random()", "numpy.random.rand()"])
def test_random_numbers_that_no_checkpoint_holds(draw, tmp_path, caplog):
    text = f"import numpy, random\ndef f(logps): return -logps * {draw}"
    assert resolved(tmp_path, text).draws
    assert "random numbers of Python or numpy, which have no seed here" in caplog.text


def collective(folder):
    text = "import torch.distributed as dist\ndef f(logps):\n    n = logps.detach().sum()\n"
    with pytest.raises(ConfigError, match=r"it calls a collective \(allreduce\)"):
        resolved(folder, f"{text}    dist.all_reduce(n)\n    return -logps * n")


def test_a_loss_that_calls_a_collective(tmp_path):
    run_on_ranks(1, collective, tmp_path)
