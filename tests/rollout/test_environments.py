import asyncio
import math

import pytest

from RL2.config.errors import ConfigError, EnvError
from RL2.rollout.environments import load_environment


def environment(tmp_path, body, timeout=5.0):
    path = tmp_path / "env.py"
    path.write_text(body)
    return load_environment(path, timeout=timeout)


def step(tmp_path, body, timeout=5.0):
    env = environment(tmp_path, body, timeout)
    return asyncio.run(env.step("state", "action", {"answer": 3}))


def answering(expression):
    return f"""
import asyncio, time
async def step(state, action, extra_info):
    return {expression}
"""


GOOD = "'next_state': state + action, 'reward': 0.5, 'score': 1, 'done': False, 'extra_info': {}"


def test_a_good_answer_is_checked_and_kept(tmp_path):
    answer = step(tmp_path, answering(f"{{{GOOD}}}"))
    assert (answer.next_state, answer.reward, answer.score) == ("stateaction", 0.5, 1.0)
    assert answer.done is False
    assert answer.extra_info == {}


def test_numpy_and_torch_scalars_are_numbers(tmp_path):
    body = """
import numpy, torch
async def step(state, action, extra_info):
    return {"reward": numpy.float32(0.5), "score": torch.tensor(2), "done": numpy.bool_(True)}
"""
    answer = step(tmp_path, body)
    assert (answer.reward, answer.score, answer.done) == (0.5, 2.0, True)
    assert answer.next_state is None
    assert answer.extra_info == {"answer": 3}


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("None", "returned NoneType, not a dict"),
        ("{'reward': 1.0}", "lacks done, score"),
        (f"{{{GOOD}, 'reward': float('nan')}}", "reward=nan is not finite"),
        (f"{{{GOOD}, 'score': float('inf')}}", "score=inf is not finite"),
        (f"{{{GOOD}, 'reward': '1'}}", "reward='1' is not a number"),
        (f"{{{GOOD}, 'score': None}}", "score=None is not a number"),
        (f"{{{GOOD}, 'done': 'no'}}", "done='no' is not a bool"),
        (f"{{{GOOD}, 'next_state': None}}", "next_state=None is not a str"),
        (f"{{{GOOD}, 'extra_info': []}}", "extra_info is list, not a dict"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("await asyncio.sleep(60)", "timed out after 0.2 s"),
        (f"time.sleep(0.3) or {{{GOOD}}}", "without awaiting, over the limit of 0.2 s"),
    ],
)
def test_a_wrong_answer_names_the_file_and_the_fault(tmp_path, expression, said):
    with pytest.raises(EnvError) as error:
        step(tmp_path, answering(expression), timeout=0.2)
    assert str(tmp_path / "env.py") in str(error.value)
    assert said in str(error.value)


def test_an_environments_own_timeout_is_not_ours(tmp_path):
    body = answering("1") + "    raise TimeoutError\n"
    body = body.replace("return 1", "pass")
    with pytest.raises(EnvError, match="raised TimeoutError"):
        step(tmp_path, body)


@pytest.mark.parametrize(
    ("returned", "state", "extra_info"),
    [("'go'", "go", {"seed": 3}), ("('go', {'n': 1})", "go", {"n": 1})],
)
def test_reset_gives_the_first_state(tmp_path, returned, state, extra_info):
    env = environment(
        tmp_path, answering("None") + f"async def reset(extra_info):\n    return {returned}\n"
    )
    assert asyncio.run(env.reset({"seed": 3})) == (state, extra_info)


def test_reset_is_checked(tmp_path):
    env = environment(tmp_path, answering("None"))
    with pytest.raises(EnvError, match="defines no `async def reset`"):
        asyncio.run(env.reset({}))
    env = environment(tmp_path, answering("None") + "async def reset(extra_info):\n    return 5\n")
    with pytest.raises(EnvError, match="reset returned 5"):
        asyncio.run(env.reset({}))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1", "must define `async def step"),
        ("def step(state, action, extra_info): pass", "must define `async def step"),
        ("import no_such_module_at_all", "cannot import: ModuleNotFoundError"),
        ("def broken(", "cannot import: SyntaxError"),
        (answering("1") + "def reset(extra_info): pass", "`reset` must be `async def`"),
    ],
)
def test_an_unusable_file_is_a_config_error(tmp_path, body, said):
    with pytest.raises(ConfigError, match="rollout.env_path=") as error:
        environment(tmp_path, body)
    assert said in str(error.value)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="rollout.env_path=.*nowhere.py: no such file"):
        load_environment(tmp_path / "nowhere.py")


def test_files_may_hold_dataclasses_and_share_a_name(tmp_path):
    body = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Kept:
    value: float = {value}
async def step(state, action, extra_info):
    return {{"reward": Kept().value, "score": 0, "done": True}}
"""
    rewards = []
    for value in (1.0, 2.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "env.py").write_text(body.format(value=value))
    for value in (1.0, 2.0):
        env = load_environment(tmp_path / str(value) / "env.py")
        rewards.append(asyncio.run(env.step("", "", {})).reward)
    assert rewards == [1.0, 2.0]
    assert math.isclose(sum(rewards), 3)
