"""A judge from a file adds a field, an estimator from another reads it, and a loss from a third."""

import json

import pytest

from tests.faults.support import Run
from tests.trainer.support import rows_of, train, write_files

JUDGE = """
async def luck(group, engine):
    asked = [sample.sequences[0]["token_ids"][:3] for sample in group.samples]
    greedy = [await engine.generate(ids, temperature=0.0, max_new_tokens=4) for ids in asked]
    again = await engine.generate(asked[0], number=1)
    return {
        "certainty": [sum(one.logps) / len(one.logps) for one in greedy],
        "place": [list(range(sample.length)) for sample in group.samples],
        "draw": [float(sum(again.token_ids))] * len(asked),
        "reward": [sample.reward + 1.0 for sample in group.samples],
    }

luck.fields = ("certainty", "place", "draw", "reward")
"""
ESTIMATOR = """
def mine(rewards, action_mask, turn_ids, entropy, max_logps, certainty, draw, *, beta=1.0):
    first = (turn_ids == 0).float()
    returns = rewards.sum(-1, keepdim=True) + certainty.exp() + draw / 1000
    return (returns - 1.5) * action_mask + beta * first * (entropy + max_logps.exp())
"""
LOSS = """
def mine(logps, advantages, old_entropy, place, turn_ids):
    return -logps * advantages / (1 + place) + 0 * old_entropy, {"place": place}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    for name, text in (("judge", JUDGE), ("estimator", ESTIMATOR), ("loss", LOSS)):
        (files / f"{name}.py").write_text(text)
    return files


def settings(files, **changes):
    return {
        "rollout__judges": f"[agreement,{files / 'judge.py'}:luck]",
        "adv__import_path": f"{files / 'estimator.py'}:mine", "adv__options__beta": 0.5,
        "actor__loss__import_path": f"{files / 'loss.py'}:mine", "trainer__max_steps": 2,
    } | changes  # fmt: skip


def numbers(rows):
    return [
        {key: value for key, value in row.items() if key.startswith(("actor/", "train/"))}
        for row in rows
    ]


def test_a_field_goes_from_a_judge_to_the_loss(files, tmp_path):
    rows = train(files, "ppo", tmp_path / "run", **settings(files))
    dumped = [
        json.loads(line)
        for path in sorted((tmp_path / "run" / "rollouts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    for sample in dumped:
        assert sample["fields"].keys() == {"agreement", "certainty", "place", "draw"}
        assert sample["fields"]["place"] == list(range(sample["length"]))
        assert 0 < sample["fields"]["agreement"] <= 1 and sample["fields"]["certainty"] <= 0
    assert {sample["reward"] for sample in dumped} == {1.0, 2.0}
    assert {sample["score"] for sample in dumped} == {0.0, 1.0}
    assert len({sample["fields"]["draw"] for sample in dumped}) > 1
    assert rows[-1]["actor/place"] > 0 and "timing/compute_old_logps" in rows[0]

    # A run that stops after the first step and goes on has the same numbers.
    for changes in ({"trainer__max_steps": 1}, {"trainer__load_ckpt_from": "latest"}):
        again = train(files, "ppo", tmp_path / "again", **settings(files, **changes))
    assert numbers(again) == numbers(rows)


@pytest.mark.parametrize("spread", ["tp_size"])
def test_two_ranks_have_the_numbers_of_one(files, tmp_path, spread):
    """Each rank judges its own groups; seeds come from a prompt's place in the step."""
    one = numbers(train(files, "ppo", tmp_path / "one", **settings(files, trainer__max_steps=1)))
    changes = settings(files, trainer__max_steps=1, **{f"actor__{spread}": 2})
    Run(files, "ppo", tmp_path / "two", 2, **changes).finish()
    two, name = numbers(rows_of(tmp_path / "two")), "rollouts/step000001_train.jsonl"
    assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    for name in ("train/reward", "actor/loss", "actor/place", "actor/grad_norm"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-4), name
