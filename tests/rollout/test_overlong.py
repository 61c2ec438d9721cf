"""DAPO's penalty for long answers: its formula, and that only the reward in training has it."""

import asyncio

import pytest

from RL2.engines.protocol import Completion, SamplingParams
from RL2.environments.environment import load_environment
from RL2.rollout.overlong import Overlong
from RL2.rollout.player import Gate, Player
from RL2.rollout.sample_table import SampleTable, to_batch
from RL2.rollout.samples import Group, Sample
from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.support import make_tokenizer


def test_formula():
    """Equation 13 with L_max = 10 and L_cache = 4: 0 up to 6 tokens, (6 - length)/4, -1 at 10."""
    found = [Overlong(4).of_turn(length, 10) for length in range(11)]
    assert found == [0] * 7 + [-0.25, -0.5, -0.75, -1]
    assert Overlong(4, 0.5).of_turn(9, 10) == -0.375
    assert Overlong(10).of_turn(1, 10) == -0.1
    assert Overlong().of_turn(10, 10) == 0 == Overlong(4).of_turn(0, 10)


@pytest.fixture
def played(tmp_path):
    path = tmp_path / "env.py"
    path.write_text(
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': state + action + '!', 'reward': 1.0, 'score': 1.0,\n"
        "            'done': len(state) > 4}\n"
    )

    def play(lengths, train=True, **options):
        """A sample that answers with these numbers of tokens, one a turn, of at most 10."""
        left = iter(lengths)

        def reply(*_):
            n = next(left)
            return Completion([70] * n, [-1.0] * n, "length" if n == 10 else "stop", [0] * n)

        async def go():
            environment = load_environment(path)
            player = Player(
                ScriptedEngine(reply), environment, make_tokenizer(), seed=0,
                max_turns=len(lengths), max_length=None, **options,
            )  # fmt: skip
            sample = Sample(0, 0, born=(0, 0))
            item = {"prompt": "q", "index": 0}
            sampling = SamplingParams(temperature=1.0, max_new_tokens=10)
            await player.play(sample, item, sampling, Gate(1), train=train)
            player.shape(sample, sampling if train else None)  # as after judges: not twice
            return sample

        return asyncio.run(go())

    return play


def test_reward_and_score(played):
    sample = played([8], overlong=Overlong(4))
    assert (sample.reward, sample.earned, sample.score, sample.penalty) == (0.5, 1, 1, -0.5)
    assert to_batch(SampleTable.of([sample]), 1)["rewards"][0].tolist() == [0] * 7 + [0.5]
    sample.set_reward(3.0)  # a judge's
    assert (sample.reward, sample.penalty, sum(sample.sequences[0]["rewards"])) == (3, 0, 3)
    sample = played([8], train=False, overlong=Overlong(4))
    assert (sample.reward, sample.penalty) == (1, 0)
    sample = played([10], overlong=Overlong(4), truncated="mask")
    assert sample.masked and sample.reward == 0


def test_each_turn_has_its_own_limit(played):
    sample = played([7, 10], overlong=Overlong(4))
    assert [turn.length for turn in sample.turns] == [7, 10]
    assert sample.penalty == -1.25 and sample.reward == 0.75
    kept = Sample.from_state_dict(0, sample.state_dict())
    assert (kept.reward, kept.penalty) == (0.75, -1.25)


def test_lengths_alone_teach_nothing(played):
    """Dynamic sampling looks at what was earned, as DAPO's does at accuracy."""
    samples = [played([n], overlong=Overlong(4)) for n in (3, 9)]
    samples[1].response = 1
    assert [sample.reward for sample in samples] == [1, 0.25]
    assert not Group(0, {}, samples).teaches(True)
    assert len(SampleTable.of(samples).without_equal_groups()[0]) == 0
