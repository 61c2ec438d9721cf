"""From a name or file to an advantage estimator, and what one of a user's own may not do."""

import random

import pytest
import torch
from omegaconf import OmegaConf

from RL2.algorithms import ADVANTAGES, resolve_advantage
from RL2.runtime.errors import ConfigError
from tests.algorithms.advantages.test_advantages import per_row, rows


def adv_config(**changes):
    neutral = {"gamma": 1.0, "lamda": 1.0, "global_norm": False, "norm_var": False}
    return OmegaConf.create({"estimator": "reinforce"} | neutral | changes)


def test_configured():
    names = ("rewards", "action_mask", "sample_ids", "group_ids")
    batch = dict(zip(names, rows([1.0, 0.0, 2.0, 0.0], group_ids=[0, 0, 1, 1]), strict=True))
    for changes, expected in (
        ({}, [0.5, -0.5, 1, -1]),
        ({"global_norm": True}, [0.25, -0.75, 1.25, -0.75]),
        ({"estimator": "spo"}, [1, 0, 2, 0]),
    ):
        assert per_row(resolve_advantage(adv_config(**changes))(batch)["advantages"]) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(estimator="gea"), "adv.estimator=gea: unknown; did you mean gae? use reinfor"),
        (dict(estimator="reinfroce"), "did you mean reinforce?"),
        (
            dict(estimator="spo", norm_var=True),
            "adv.norm_var=true: has no effect with adv.estimator=spo; set it to false",
        ),
        (dict(gamma=0.9), "adv.gamma=0.9: has no effect with adv.estimator=reinforce; set it to 1"),
        (dict(beta=1), "adv.beta=1: has no effect with adv.estimator=reinforce; leave it out"),
        (
            dict(options={"norm_vra": 1}),
            "adv.options.norm_vra=1: no option of adv.estimator=reinforce; did you mean norm_var?",
        ),
        (
            dict(norm_var=True, options={"norm_var": True}),
            "adv.norm_var and adv.options.norm_var: the same option twice; keep one",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ConfigError) as error:
        resolve_advantage(adv_config(**changes))
    assert message in str(error.value)


def resolved(folder, body, **changes):
    path = folder / "mine.py"
    path.write_text(f"import random, torch\nimport torch.distributed as dist\n{body}\n")
    return resolve_advantage({"import_path": f"{path}:f", **changes})


@pytest.mark.parametrize("name", ADVANTAGES)
def test_our_own_stand_the_trial(name, caplog):
    resolve_advantage({"estimator": name})
    assert caplog.messages == []


def test_options_are_bound(tmp_path):
    body = "def f(rewards, *, gamma, beta=1.0):\n    return rewards * gamma + beta"
    batch = {"rewards": torch.ones(1, 2), "action_mask": torch.tensor([[True, False]])}
    found = resolved(tmp_path, body, gamma=0.5, options={"beta": 3.0})(batch)
    assert found["advantages"].tolist() == [[3.5, 0.0]]  # 0 where there is no action
    assert (
        resolved(tmp_path, body, gamma=1.0, options={"gamma": 0.25})(batch)["advantages"][0, 0]
        == 1.25
    )
    with pytest.raises(ConfigError, match="mine.py:f: its option gamma has no default; set adv.op"):
        resolved(tmp_path, body)


SURE = [
    (
        "def f(rewards):\n    1 / 0",
        "samples each, it raised ZeroDivisionError: division by",
    ),
    ("def f(rewards):\n    exit(0)", "it raised SystemExit: 0 (mine.py:4)"),
    ("def f(rewards): return rewards.sum(-1)", "advantages of 5 rows came back as [5], expected a"),
    ("def f(rewards): return 0", "advantages of 5 rows came back as int, expected a tensor [5, 4]"),
    ("def f(rewards): return rewards > 0", "advantages came back as bool, expected float32 or fl"),
    (
        "def f(rewards):\n    x = rewards / 0\n    return x",
        "11 of 11 advantages are not finite, the first of them nan in row 0 (mine.py:4, div)",
    ),
    ("def f(rewards):\n    rewards += 1\n    return rewards", "it changed rewards in place, which"),
    (
        "def f(rewards):\n    torch.set_grad_enabled(False)\n    return rewards",
        "it called torch.set_grad_enabled, which changes the whole run",
    ),
    (
        "def f(rewards):\n    torch.manual_seed(0)\n    return rewards + torch.rand(())",
        "it seeds torch's random numbers",
    ),
    (
        "n = []\ndef f(rewards):\n    n.append(0)\n    return rewards if len(n) < 5 else n",
        "called a",
    ),
    (
        "def f(reward): return reward",
        "its parameter reward is no field of a batch; did you mean re",
    ),
    (
        "def f(rewards, logps): return rewards",
        "its parameter logps is no field of a batch; did you",
    ),
    (
        "def f(*rewards): return rewards",
        "its parameter *rewards does not say what the estimator ne",
    ),
    ("def f(*, x=1): return x", "takes nothing of a batch; name fields such as rewards"),
    (
        'def f(rewards): return rewards, {"returns": rewards}',
        "it returned returns, which nothing learns without a critic; name values among its",
    ),
    (
        'def f(rewards, values): return rewards, {"return": rewards}',
        'it returned a tuple that is not (advantages, {"returns": returns}); return the adv',
    ),
    (
        'def f(rewards, values): return rewards, {"returns": rewards / 0}',
        "11 of 11 returns are not finite, the first of them nan in row 0 (mine.py:3, div)",
    ),
    (
        'def f(rewards, values): return rewards, {"returns": 0}',
        "returns of 5 rows came back as int, expected a tensor [5, 4]",
    ),
]
POSSIBLE = [
    (
        "def f(rewards, group_ids):\n    x = rewards.sum(-1, keepdim=True)\n"
        "    return (x - x.mean()) / x.std(correction=0) * torch.ones_like(rewards)",
        "on a batch of one sample, 3 of 3 advantages are not finite, the first of them nan in row 0"
        " (mine.py:5, div); such a rollout ends the run",
    ),
    (
        "def f(rewards): return rewards + torch.rand(rewards.shape)",
        "mine.py:f: draws random numbers, so that a run with dropout or another number of ranks",
    ),
    (
        "def f(rewards): return rewards + random.random()",
        "mine.py:f: draws random numbers of Python or numpy, which have no seed here",
    ),
]


@pytest.mark.parametrize(("body", "said"), SURE)
def test_what_every_run_meets_is_one_line(tmp_path, body, said):
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, body)
    assert str(caught.value).startswith(f"adv.import_path={tmp_path}/mine.py:f: ")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("body", "said"), POSSIBLE)
def test_what_some_runs_meet_is_a_warning(tmp_path, body, said, caplog):
    resolved(tmp_path, body)
    assert said in caplog.messages[0]


def test_a_trial_leaves_random_numbers_and_settings_where_they_were(tmp_path):
    before = torch.get_rng_state(), random.getstate()
    body = "def f(rewards):\n    return rewards + torch.rand(rewards.shape) + random.random()"
    resolved(tmp_path, body)
    assert torch.equal(before[0], torch.get_rng_state())


def test_every_field_stands_the_trial(tmp_path, caplog):
    """The table of `RL2.algorithms.parameters`: shapes and dtypes of all that may be named."""
    names = (
        "rewards, action_mask, sample_ids, group_ids, lengths, correct, turn_ids, old_logps, "
        "ref_logps, llm_logps, log1mps, max_logps, max_log1mps, entropy, ranks"
    )
    body = f"""
def f({names}):
    B, T = action_mask.shape
    for x in (sample_ids, group_ids, lengths):
        assert x.shape == (B,) and x.dtype == torch.int64
    assert correct.shape == (B,) and correct.dtype == torch.bool
    assert turn_ids.dtype == torch.int64 and (turn_ids[~action_mask] == -1).all()
    for x in (old_logps, ref_logps, llm_logps, log1mps, max_logps, max_log1mps, entropy, ranks):
        assert x.shape == (B, T) and x.dtype == torch.float32
    assert rewards.dtype == torch.float64
    return rewards
"""
    resolved(tmp_path, body)
    assert caplog.messages == []
