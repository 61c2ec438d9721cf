"""A step that updates nothing is a step; what a step depends on is in the checkpoint before it."""

import shutil

import pytest

from RL2.runtime.errors import ConfigError
from tests.trainer.support import (
    checkpoint_tensors,
    lasting,
    same_weights,
    train,
    weights,
    write_env,
    write_files,
)

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


PASSES = {
    "train_data__responses_per_prompt": 2, "rollout__dynamic_filtering": "false",
    "actor__update_per_rollout": 2, "actor__epochs_per_rollout": 2, "actor__scheduler": "cosine",
    "actor__kl__coef": 0.3, "actor__kl__type": "loss", "actor__kl__loss_estimator": "k3",
    "actor__kl__clamp": 10, "actor__kl__unbiased": "true", "actor__kl__avg_level": "sequence_sum",
    "actor__max_ratio": 10, "actor__min_lr_ratio": 0.1, "actor__betas": "[0.9,0.95]",
    "ref_actor__renew_every": 2, "ref_actor__renew_mix": 0.5, "trainer__save_freq": 1,
    "trainer__n_epochs": 2, "trainer__max_steps": 4,
}  # fmt: skip


def test_several_passes_and_a_renewed_reference_go_on_bit_for_bit(tmp_path):
    """From before the first renewal, and from between two; also when no more are wanted."""
    files = write_files(tmp_path)
    whole = train(files, "ppo", tmp_path / "whole", **PASSES)
    assert all(row["actor/mean_ratio"] > 0 and row["actor/ratio_skipped"] == 0 for row in whole)
    assert whole[2]["actor/kl"] < whole[1]["actor/kl"]  # closer to the actor
    assert [row["actor/lr"] for row in whole][-1] > 1e-4
    first, third = (
        checkpoint_tensors(tmp_path / f"whole/checkpoints/step{step:06d}") for step in (1, 3)
    )
    assert "ref_actor" not in first and third["ref_actor"].keys() == {"model"}
    for step, changes in ((1, {}), (3, {}), (3, {"ref_actor__renew_every": 0})):
        changes = changes | ({"ref_actor__renew_mix": 1.0} if changes else {})
        folder = tmp_path / f"from{step}{len(changes)}"
        shutil.copytree(tmp_path / "whole", folder)
        checkpoint = folder / f"checkpoints/step{step:06d}"
        rows = train(
            files, "ppo", folder, **PASSES | changes | {"trainer__load_ckpt_from": checkpoint}
        )
        resumed = [lasting(row) for row in rows]
        assert resumed == [lasting(row) for row in whole]
        assert same_weights(weights(folder / "final"), weights(tmp_path / "whole/final"))


def test_a_reference_without_use_is_not_renewed(tmp_path):
    files = write_files(tmp_path)
    with pytest.raises(ConfigError, match="^ref_actor.renew_every=2: has no effect, as nothing is"):
        train(files, "ppo", tmp_path / "run", ref_actor__renew_every=2)
