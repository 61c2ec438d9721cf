"""The sign is right: what is rewarded gets likelier."""

import statistics

import pytest

from tests.trainer.support import train, write_env, write_files

# A vowel among six characters: a random model writes one in a part of its responses.
VOWEL = """
async def step(state, action, extra_info):
    good = float(any(letter in "aeiouAEIOU" for letter in action))
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"actor__update_per_rollout": 2, "actor__avg_level": "sequence", "adv__norm_var": "true"},
        {"actor__loss__name": "nll"},
        {"adv__estimator": "gae", "adv__lamda": 0.95, "critic__lr": 1e-2},
    ],
    ids=["Dr. GRPO", "clipped, GRPO", "REINFORCE", "PPO with a critic"],
)
def test_policy_gradients_raise_the_reward(tmp_path, loss):
    files = write_files(tmp_path)
    write_env(files / "env.py", VOWEL)
    rows = train(
        files, "ppo", tmp_path / "run", train_data__responses_per_prompt=8, actor__lr=1e-2,
        trainer__n_epochs=8, actor__warmup_ratio=0.0, **loss,
    )  # fmt: skip
    scores = [row["train/score"] for row in rows]
    first, last = statistics.mean(scores[:3]), statistics.mean(scores[-3:])
    assert first < 0.8
    assert last > first + 0.15, scores


def test_spo_makes_the_tokens_of_correct_samples_likelier(tmp_path):
    """Trained on correct samples alone, the policy writes more of them, target detached."""
    files = write_files(tmp_path)
    write_env(files / "env.py", VOWEL)
    rows = train(
        files, "spo", tmp_path / "run", train_data__responses_per_prompt=8, actor__lr=1e-2,
        actor__avg_level="correct", actor__loss__detach_target="true", trainer__n_epochs=8,
        actor__warmup_ratio=0.0, rollout__dynamic_filtering="false",
    )  # fmt: skip
    scores = [row["train/score"] for row in rows]
    assert statistics.mean(scores[-3:]) > statistics.mean(scores[:3]) + 0.1, scores
