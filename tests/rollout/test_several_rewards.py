"""Several rewards of an environment: from its answer to the batch, the metrics and the file."""

import asyncio
import json

import pytest

from RL2.engines.protocol import Completion, SamplingParams
from RL2.environments.environment import load_environment
from RL2.rollout.player import Gate, Player
from RL2.rollout.sample_table import SampleTable, dump, summarise, to_batch
from RL2.rollout.samples import Sample
from RL2.runtime.errors import ConfigError
from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.support import make_tokenizer

WEIGHTS = {"right": 1.0, "form": 0.25}


@pytest.fixture
def played(tmp_path):
    def play(returned, turns=1, response=0, truncated="keep", weights=WEIGHTS):
        """A sample of an environment that returns this beside `score` and `done`."""
        path = tmp_path / "env.py"
        path.write_text(
            "async def step(state, action, extra_info):\n"
            f"    return dict({returned}, score=1.0, next_state=state + action + '!',\n"
            f"                done=state.count('!') + 1 == {turns})\n"
        )

        def reply(*_):
            end = "length" if truncated == "zero" else "stop"
            return Completion([70, 1], [-1.0] * 2, end, [0] * 2)

        async def go():
            player = Player(
                ScriptedEngine(reply), load_environment(path), make_tokenizer(), seed=0,
                max_turns=turns, max_length=None, truncated=truncated, rewards=weights,
            )  # fmt: skip
            sample = Sample(0, response, born=(0, 0))
            sampling = SamplingParams(temperature=1.0, max_new_tokens=10)
            await player.play(sample, {"prompt": "q"}, sampling, Gate(1), train=True)
            return sample

        return asyncio.run(go())

    return play


def test_the_reward_is_their_weighted_sum_if_there_is_none(played):
    rewards = "rewards={'right': 1, 'form': 2.0}"
    sample = played(rewards, turns=2)
    assert (sample.reward, sample.parts) == (3.0, {"right": 2.0, "form": 4.0})
    assert played(f"{rewards}, reward=7.0").reward == 7.0
    sample = played(rewards, truncated="zero")
    assert (sample.reward, sample.score, sample.parts) == (0, 1, {"right": 0, "form": 0})
    kept = Sample.from_state_dict(0, played(rewards).state_dict())
    assert kept.parts == {"right": 1.0, "form": 2.0}


@pytest.mark.parametrize(
    ("returned", "weights", "fault"),
    [
        (
            "reward=1.0",
            WEIGHTS,
            "step returned the rewards [], and rollout.rewards names ['form', ",
        ),
        (
            "reward=1.0, rewards={'right': 1}",
            {},
            "step returned the rewards ['right'], and rollout",
        ),
        ("rewards={'right': 'x', 'form': 1}", WEIGHTS, "rewards['right']='x' is not a number"),
        ("rewards={1: 2}", WEIGHTS, "rewards={1: 2} is not a dict of numbers by name"),
        ("rewards=1.0", WEIGHTS, "the returned dict lacks reward; unknown keys: 'rewards'"),
        ("no=1", WEIGHTS, "the returned dict lacks reward; unknown keys: 'no'"),
    ],
)
def test_faults(played, returned, weights, fault):
    sample = played(returned, weights=weights)
    assert sample.cause == "env" and fault in sample.error and "\n" not in sample.error


def test_a_literal_answer_is_checked_before_a_model_loads(tmp_path):
    path = tmp_path / "env.py"
    step = "async def step(state, action, extra_info):\n    return {'score': 1.0, 'done': True, "
    path.write_text(step + "'rewards': {}}\n")
    load_environment(path)
    path.write_text(step + "'reward_s': {}}\n")
    with pytest.raises(ConfigError, match="a dict that lacks reward"):
        load_environment(path)


def test_batch_metrics_and_file(played, tmp_path):
    samples = [
        played("rewards={'right': 0.1, 'form': 2}", turns=2),
        played("rewards={'right': 1, 'form': 0}", response=1),
    ]
    table = SampleTable.of(samples, lines=True, parts=tuple(WEIGHTS))
    batch = to_batch(table, 2, WEIGHTS)
    assert batch["reward_parts"].tolist() == [[0.2, 4.0], [1.0, 0.0]]
    assert batch["reward_weights"].tolist() == [[1.0, 0.25]] * 2
    metrics = summarise(table, "train")
    assert (metrics["reward/right"], metrics["reward/form"]) == (0.6, 2.0)
    assert summarise(table, "test")["test/reward/form"] == 2.0
    dump(table, tmp_path / "dump.jsonl")
    line = json.loads((tmp_path / "dump.jsonl").read_text().splitlines()[0])
    assert line["rewards"] == {"right": 0.2, "form": 4.0} and line["reward"] == 1.2
