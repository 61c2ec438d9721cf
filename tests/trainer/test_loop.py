"""Whole runs: what a step that updates nothing, or fails, leaves; which model is the best."""

import pytest

from RL2.runtime.errors import TrainingError
from RL2.trainer.checkpoints.integrity import damage
from tests.trainer.support import same_weights, train, weights, write_env, write_files


def test_what_was_learned_before_a_loss_goes_wrong_is_saved(tmp_path):
    files = write_files(tmp_path)
    (files / "loss.py").write_text(
        "calls = 0\n\n\ndef f(logps):\n    global calls\n    calls += len(logps) > 3\n"
        "    return -logps if calls < 3 else (-logps).sum()\n"
    )
    said = r"^actor.loss.*: losses of \d+ tokens came back as \[\], .*; step 2 is in "
    with pytest.raises(TrainingError, match=said):
        train(files, "sft", tmp_path / "run", actor__loss__import_path=f"{files / 'loss.py'}:f")
    assert damage(tmp_path / "run/checkpoints/step000002") is None


NEVER_RIGHT = """
async def step(state, action, extra_info):
    return {"next_state": None, "reward": 0.0, "score": 0.0, "done": True}
"""
TWICE = {"actor__update_per_rollout": 2}
# What computes log-probabilities and updates nothing.
IDLE = {
    "frozen": TWICE | {"actor__freeze_steps": 3},
    "frozen, KL in the reward": {
        "actor__freeze_steps": 3, "actor__kl__coef": 0.1, "actor__kl__type": "reward",
    },
    "nothing correct": TWICE | {"actor__avg_level": "correct", "rollout__env_path": "never.py"},
}  # fmt: skip


@pytest.mark.parametrize("kind", IDLE)
def test_steps_that_update_nothing_are_evaluated_saved_and_published(tmp_path, kind):
    files = write_files(tmp_path)
    write_env(files / "never.py", NEVER_RIGHT)
    changes = dict(IDLE[kind])
    if "rollout__env_path" in changes:
        changes["rollout__env_path"] = files / changes["rollout__env_path"]
    rows = train(
        files, "ppo", tmp_path / "run", test_data__path=files / "rows.jsonl",
        test_data__max_examples=4, train_data__responses_per_prompt=2,
        rollout__dynamic_filtering="false", trainer__test_freq=1, trainer__save_freq=1,
        **changes,
    )  # fmt: skip
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["test/score"] == rows[0]["test/score"] for row in rows)
    assert same_weights(weights(tmp_path / "run/final"), weights(files / "model"))


EVER_BETTER = """
calls = 0


async def step(state, action, extra_info):
    global calls
    calls += 1
    return {"next_state": None, "reward": 1.0, "score": calls - 1000.0, "done": True}
"""


def test_best_is_kept_for_any_finite_score(tmp_path):
    files = write_files(tmp_path)
    rows = train(
        files, "spo", tmp_path / "run", test_data__path=files / "rows.jsonl",
        test_data__max_examples=4, trainer__test_freq=1, trainer__max_steps=2,
        rollout__env_path=write_env(files / "better.py", EVER_BETTER), rollout__env_workers=0,
    )  # fmt: skip
    scores = [row["test/score"] for row in rows]
    assert scores == sorted({*scores}) and scores[-1] < -900
    assert same_weights(weights(tmp_path / "run/best"), weights(tmp_path / "run/final"))
