"""A step that updates nothing is a step."""

import pytest

from tests.trainer.support import same_weights, train, weights, write_env, write_files

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
