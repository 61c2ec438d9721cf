"""What a run saves: the last good step where a loss goes wrong, and the best model."""

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
