"""What a judge may return, how it fails, and what it finds in groups that are carried."""

import asyncio
import re
from pathlib import Path

import pytest

from RL2.algorithms import resolve_advantage
from RL2.engines.protocol import Completion, SamplingParams
from RL2.environments.environment import load_environment
from RL2.rollout.flight import GroupsInFlight
from RL2.rollout.judges.judge import JUDGES, fields_of, judge_group, resolve_judges
from RL2.rollout.player import Player
from RL2.rollout.sample_table import SampleTable, to_batch
from RL2.rollout.samples import Group, Sample, Turn, extend, start_sequence
from RL2.runtime.errors import ConfigError, EngineError
from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.support import make_tokenizer

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4)


def written(folder, body, fields="('x',)"):
    path = folder / "judge.py"
    path.write_text(f"async def f(group, engine):\n    {body}\nf.fields = {fields}\n")
    return f"{path}:f"


def make_group(endings=("so 4", "so 5", "or 4")):
    samples = []
    for response, ending in enumerate(endings):
        sample = Sample(0, response, born=(3, 7), prompt="q", ended=True)
        sample.sequences = [start_sequence([9, 9])]
        extend(sample.sequences[0], [5, 6], Completion([5, 6], [-1.0, -2.0], "stop", [0, 0]))
        sample.turns = [Turn("q", f"thus\n{ending}", 2, "stop", 0.5, 1.0)]
        sample.sequences[0]["rewards"][-1] = 0.5
        samples.append(sample)
    return Group(0, {"index": 0}, samples)


def judged(names, group=None, reply=None, **options):
    """The group after the judges, and the engine that they asked."""
    group = group or make_group()
    engine = ScriptedEngine(reply or (lambda *_: Completion([1], [-0.5], "stop", [0])))

    async def go():
        player = Player(
            engine, None, make_tokenizer(), seed=1, max_turns=1, max_length=None, **options
        )
        flight = GroupsInFlight(None, engine, 2)
        await judge_group(group, resolve_judges(names), player, flight.gate, SAMPLING)

    asyncio.run(go())
    return group, engine


def test_fields_and_rewards_come_to_the_batch(tmp_path):
    fields = "('x', 'y', 'reward')"
    body = "return {'x': [1, 2.5, True], 'y': [[1, 2]] * 3, 'reward': [0, 2, -1]}"
    group, _ = judged([written(tmp_path, body, fields)])
    assert [sample.reward for sample in group.samples] == [0.0, 2.0, -1.0]
    assert [sample.score for sample in group.samples] == [1.0, 1.0, 1.0]
    batch = to_batch(SampleTable.of(group.samples, fields=("x", "y")), 3)
    assert batch["x"].tolist() == [[0.0, 1.0, 1.0], [0.0, 2.5, 2.5], [0.0, 1.0, 1.0]]
    assert batch["y"].tolist() == [[0.0, 1.0, 2.0]] * 3
    assert batch["rewards"].sum(1).tolist() == [0.0, 2.0, -1.0]
    assert batch["correct"].tolist() == [False, True, False]
    again = Group.from_state_dict(2, group.item, group.state_dict())
    assert again.judged and [one.fields for one in again.samples] == [
        one.fields for one in group.samples
    ]


def test_those_that_failed_are_not_shown(tmp_path):
    group = make_group()
    group.samples[1].fail("lost", "env")
    group, _ = judged(["agreement"], group)
    assert [one.fields.get("agreement") for one in group.samples] == [0.5, None, 0.5]
    batch = to_batch(SampleTable.of(group.samples, fields=("agreement",)).good(), 3)
    assert batch["agreement"][:, 1].tolist() == [0.5, 0.5]


def test_a_sample_that_was_cut_off_keeps_the_reward_0(tmp_path):
    group = make_group()
    group.samples[0].turns[0].finish_reason = "length"
    body = "return {'reward': [1, 1, 1]}"
    group, _ = judged([written(tmp_path, body, "'reward'")], group, truncated="zero")
    assert [sample.reward for sample in group.samples] == [0.0, 1.0, 1.0]


def test_seeds_depend_on_what_is_asked_and_not_on_when(tmp_path):
    body = (
        "import asyncio\n"
        "    a, b, c = await asyncio.gather(engine.generate([1, 2]), engine.generate([3]),"
        " engine.generate([3], number=1, temperature=0.0))\n"
        "    return {'x': [1, 2, 3]}"
    )
    _, engine = judged([written(tmp_path, body)])
    seeds = {(*ids, sampling.temperature): seed for ids, sampling, seed in engine.calls}
    assert len(set(seeds.values())) == 3 and engine.most_open == 2
    body = "await engine.generate([3])\n    return {'x': [1, 2, 3]}"
    _, engine = judged([written(tmp_path, body)])
    assert engine.calls[0][2] == seeds[3, 1.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", "judge.py:f: it raised ZeroDivisionError: division by zero (judge.py:2)"),
        ("exit(1)", "it raised SystemExit: 1 (judge.py:2)"),
        ("return 3", "it returned int; return {name: values} with the names of its fields, x"),
        ("return {'y': [1]}", "it returned ['y']; return {name: values}"),
        ("return {'x': [1]}", "x must be a list of 3, one entry for each sample of the group"),
        ("return {'x': [1, 2, [3]]}", "x of a sample must be one number, or 2, one per token, and"),
        ("return {'x': [1, 2, float('nan')]}", "x of a sample is nan, which is not a finite"),
        ("await engine.generate([])", "generate: the prompt has no tokens"),
    ],
)
def test_a_judge_that_fails_fails_the_samples(tmp_path, body, said):
    group, _ = judged([written(tmp_path, body)])
    for sample in group.samples:
        assert said in sample.error and sample.error.startswith("rollout.judges=")
        assert sample.cause == "env" and "\n" not in sample.error


def test_an_engine_that_fails_is_not_the_judges_fault(tmp_path):
    with pytest.raises(EngineError, match="gone"):
        judged(
            [written(tmp_path, "await engine.generate([1])")], reply=lambda *_: EngineError("gone")
        )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["agrement"],
            "rollout.judges=agrement: unknown; did you mean agreement? use agree",
        ),
        (["agreement", "agreement"], "another judge already adds agreement; keep one of them"),
        (["math:sin"], "rollout.judges=math:sin: is not an async function"),
    ],
)
def test_names_that_are_none(names, said):
    with pytest.raises(ConfigError) as caught:
        resolve_judges(names)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("()", 'does not say what it adds to samples; write f.fields = ("my_field",) below it'),
        ("('entropy',)", "its field entropy is already in use; give it another name"),
        ("('a b',)", "its field a b is not a valid parameter name; give it another name"),
    ],
)
def test_fields_that_cannot_be(tmp_path, fields, said):
    with pytest.raises(ConfigError) as caught:
        resolve_judges([written(tmp_path, "return {}", fields)])
    assert said in str(caught.value)


def test_our_own_are_resolved():
    judges = resolve_judges([name for name in JUDGES if name != "reward_model"])
    assert fields_of(judges) == ("agreement", "greedy_reward")


def test_a_group_that_is_carried_is_judged_once():
    """One that had ended, but was not judged when the step did, is judged in the next."""
    seen = []

    async def go():
        async def judge(group, gate):
            seen.append(group.position)
            group.judged = True

        flight = GroupsInFlight(None, ScriptedEngine(None), 2, judge=judge)
        done, left = make_group(), make_group()
        done.judged, left.position = True, 1
        await flight.take_over([done, left])
        return await flight.answer([], wanted=2)

    assert [group.position for group in asyncio.run(go())] == [0, 1] and seen == [1]


def test_the_examples_of_the_docs(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "estimators.md").read_text()
    estimator, _, judge = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_estimator.py").write_text(estimator)
    (tmp_path / "my_judge.py").write_text(judge)
    path = f"{tmp_path}/my_estimator.py:surprised"
    found = resolve_advantage({"import_path": path, "options": {"bonus": 0.2}})
    assert found.inputs == ("rewards", "action_mask", "entropy", "turn_ids")
    group, engine = judged(["agreement", f"{tmp_path}/my_judge.py:certainty"])
    assert [one.fields["certainty"] for one in group.samples] == [-0.5] * 3
    (ids, sampling, _) = engine.calls[0]
    assert ids == [9, 9] and sampling.temperature == 0.0


def test_greedy_answer_is_played_through_the_environment(tmp_path):
    """Two turns at temperature 0; its reward is the baseline of all samples, its tokens count."""
    path = tmp_path / "env.py"
    path.write_text(
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': state + action + '!', 'reward': extra_info['worth'],\n"
        "            'score': 0.0, 'done': '!' in state}\n"
    )
    group = make_group()
    group.item = {"index": 0, "prompt": "q", "extra_info": {"worth": 0.3}}
    engine = ScriptedEngine(lambda *_: Completion([70, 71, 1], [-0.5] * 3, "stop", [0] * 3))

    async def go(environment, group):
        player = Player(engine, environment, make_tokenizer(), seed=1, max_turns=3, max_length=None)
        flight = GroupsInFlight(None, engine, 2)
        judges = resolve_judges(["agreement", "greedy"])
        await judge_group(group, judges, player, flight.gate, SAMPLING)

    asyncio.run(go(load_environment(path), group))
    assert [one.fields["greedy_reward"] for one in group.samples] == [0.6] * 3
    assert [sampling.temperature for _, sampling, _ in engine.calls] == [0.0, 0.0]
    assert len({seed for *_, seed in engine.calls}) == 2
    assert [one.judge_tokens for one in group.samples] == [6, 0, 0]
    assert SampleTable.of(group.samples).samples["judge_tokens"].sum() == 6
    assert group.samples[0].reward == 0.5

    group = make_group()
    group.item = {"index": 0, "prompt": "q", "extra_info": {}}
    asyncio.run(go(load_environment(path), group))
    assert "rollout.judges=greedy: " in group.samples[0].error
    assert "step raised KeyError: 'worth'" in group.samples[0].error
