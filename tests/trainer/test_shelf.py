"""Estimators that need more than a reward: the greedy answer's, and several rewards."""

import json

from tests.trainer.support import train, write_env, write_files

ENVIRONMENT = """
async def step(state, action, extra_info):
    form = len(set(action)) / 8
    return {"next_state": None, "score": 0.0, "done": True, "rewards": {"form": form, "short": 1.0}}
"""


def test_remax_with_several_rewards_and_resumed(tmp_path):
    """The baseline is the reward of the answer at temperature 0, its tokens are counted, each
    reward is logged, and a run that goes on has the same numbers."""
    files = write_files(tmp_path / "files")
    write_env(files / "env.py", ENVIRONMENT)
    settings = {
        "algorithm": "remax", "rollout__rewards": "{form: 1.0, short: -0.5}",
        "rollout__overlong_buffer": 2, "trainer__max_steps": 2,
    }  # fmt: skip
    rows = train(files, "ppo", tmp_path / "run", **settings)
    dumped = [
        json.loads(line)
        for path in sorted((tmp_path / "run" / "rollouts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    for sample in dumped:
        assert sample["rewards"]["short"] == 1.0 and sample["rewards"]["form"] > 0
        penalty = sample["reward"] - sample["rewards"]["form"] + 0.5
        assert -1 <= round(penalty, 9) <= 0
    baselines = {(s["prompt"], s["fields"]["greedy_reward"]) for s in dumped[: len(dumped) // 2]}
    assert len(baselines) == len({prompt for prompt, _ in baselines}) > 1
    for row in rows:
        assert row["reward/short"] == 1.0 and row["train/overlong_penalty"] <= 0
        assert 0 < row["rollout/judge_tokens"] < row["rollout/tokens"]
        assert row["actor/grad_norm"] > 0

    for changes in ({"trainer__max_steps": 1}, {"trainer__load_ckpt_from": "latest"}):
        again = train(files, "ppo", tmp_path / "again", **settings | changes)
    kept = ("actor/", "train/", "reward/")
    for one, other in zip(rows, again, strict=True):
        assert {k: x for k, x in one.items() if k.startswith(kept)} == {
            k: x for k, x in other.items() if k.startswith(kept)
        }
    gdpo = {"algorithm": "gdpo", "train_data__responses_per_prompt": 2, "trainer__max_steps": 1}
    gdpo |= {"rollout__rewards": settings["rollout__rewards"]}
    assert train(files, "ppo", tmp_path / "gdpo", **gdpo)[0]["actor/grad_norm"] > 0
