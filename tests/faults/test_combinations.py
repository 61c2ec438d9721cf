"""Runs of many kinds, killed, stopped and resumed, are the runs that nobody disturbed.

What else a run carries from step to step: adapters and their dropout, several updates a rollout,
conversations, prompts that are drawn again, steps that overlap, parameters that are spread, a
critic, references that are kept or renewed, rows that are held out.
"""

import json
import random
import signal
import time

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.faults.support import LONG, Run, assert_nothing_half, assert_same_run
from tests.trainer.support import write_env, write_files, write_model, write_pairs

# The reward of what it has said so far decides whether the policy goes on.
CONVERSATION = """
async def step(state, action, extra_info):
    good = float(sum(map(ord, action)) % 2)
    if len(state) < 60 and len(action) % 3:
        said = state + action + " again: "
        return {"next_state": said, "reward": 0.5 * good, "score": 0.0, "done": False}
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""
COMMON = {
    "trainer__max_steps": 6, "trainer__n_epochs": 8, "trainer__save_freq": 1,
    "trainer__keep_last": 2, "trainer__test_freq": 2,
    "actor__scheduler": "cosine", "actor__warmup_ratio": 0.3, "actor__lr": "1e-2",
}  # fmt: skip
ROLLOUTS = {"test_data__path": "rows.jsonl", "test_data__max_examples": 6}
ROWS, ON_ROWS = {"data__test_ratio": 0.25}, ("sft", "dpo", "rm")
AHEAD, BESIDE = {"rollout__staleness": 1}, {"trainer__async_save": "true"}
GROUPS = {"train_data__responses_per_prompt": 4}
LORA = {"actor__lora__rank": 4, "actor__lora__dropout": 0.1}
AGAIN = GROUPS | {"rollout__max_resampled": 16}
TALK = {"rollout__env_path": "talk.py", "rollout__max_turns": 3}
CRITIC = GROUPS | {
    "algorithm": "ppo_critic", "critic__lr": "1e-2", "train_data__prompts_per_rollout": 4,
}  # fmt: skip
TWICE = {"actor__update_per_rollout": 2, "actor__epochs_per_rollout": 2}
RENEWED = {"ref_actor__renew_every": 2, "ref_actor__renew_mix": 0.5}
LABELS = {"algorithm": "kto", "data__path": "labels.jsonl", "data__batch_size": 8}
TEACHER = {"teacher__model_name": "other", "teacher__top_k": 5}
# (trainer, ranks, changes), in which names of files stand for them
KINDS = {
    "adapters": ("spo", 1, LORA),
    "critic, adapters, ahead, beside": ("ppo", 2, CRITIC | LORA | AHEAD | BESIDE),
    "critic, several passes": ("ppo", 2, CRITIC | TWICE | {"actor__freeze_steps": 1}),
    "critic, alone, several passes": ("ppo", 1, CRITIC | TWICE | AHEAD | BESIDE),
    "pairs, another reference": ("dpo", 2, BESIDE | {"ref_actor__model_name": "other"}),
    "pairs, saved now and then": ("dpo", 2, {"trainer__save_freq": 2, "trainer__test_freq": 3}),
    "pairs, adapters, renewed": ("dpo", 2, LORA | RENEWED | BESIDE),
    "pairs, renewed": ("dpo", 1, RENEWED),
    "pairs, one epoch": ("dpo", 2, {"trainer__n_epochs": 1, "data__batch_size": 1}),
    "pairs, no reference": ("dpo", 1, LORA | {"actor__loss__name": "orpo"}),
    "labels": ("dpo", 2, LABELS | {"ref_actor__model_name": "other"}),
    "labels, adapters": ("dpo", 1, LABELS | LORA | BESIDE),
    "pairs as labels": ("dpo", 2, {"actor__loss__name": "kto", "trainer__source": "pairs"}),
    "reward model": ("rm", 2, BESIDE),
    "reward model, adapters": ("rm", 1, LORA),
    "reward model as a judge": (
        "ppo", 2, GROUPS | {"rollout__reward_model__model_name": "scores",
                            "rollout__judges": "[reward_model]"},
    ),
    "rows, held out": ("sft", 2, {}),
    "teacher of rows": ("sft", 2, TEACHER | {"actor__loss__name": "topk_kl"}),
    "teacher, divergence": ("ppo", 2, TEACHER | {"algorithm": "gkd"}),
    "teacher, top tokens, ahead": ("ppo", 1, TEACHER | AHEAD | {"algorithm": "topk_distillation"}),
    "teacher, reverse KL": (
        "ppo", 2, {"algorithm": "on_policy_distillation", "teacher__model_name": "other"},
    ),
    "teacher and rewards": (
        "ppo", 2, GROUPS | BESIDE | {"algorithm": "reinforce_distillation",
                                     "teacher__model_name": "other"},
    ),
    "its own teacher, ahead": (
        "ppo", 2, LORA | AHEAD | {"algorithm": "self_distillation",
                                  "train_data__path": "answers.jsonl"},
    ),
    "renewed reference, adapters": (
        "ppo", 2, LORA | GROUPS | RENEWED | {"actor__kl__coef": 0.1, "actor__kl__type": "loss"},
    ),
    "reference, two updates": (
        "ppo", 2, GROUPS | {"actor__update_per_rollout": 2, "actor__kl__coef": 0.1,
                            "actor__kl__type": "loss"},
    ),
    "reference in the reward": (
        "ppo", 2, GROUPS | BESIDE | {"actor__kl__coef": 0.1, "actor__kl__type": "reward",
                                     "adv__global_norm": "true", "adv__norm_var": "true"},
    ),
    "drawn again": ("ppo", 2, AGAIN),
    "drawn again, ahead": ("ppo", 1, AGAIN | AHEAD),
    "turns": ("ppo", 1, TALK | GROUPS),
    "turns, ahead, beside": ("spo", 2, TALK | AHEAD | BESIDE),
    "fixed target, saved now and then": ("spo_0p5", 1, BESIDE | {"trainer__save_freq": 2}),
    "first steps do not train": ("spo", 1, AHEAD | {"actor__freeze_steps": 2}),
    "top-p, mask, samples of tests": (
        "ppo", 1, GROUPS | {
            "rollout__train_sampling_params__top_p": 0.8, "actor__tis_type": "mask",
            "rollout__train_sampling_params__temperature": 0.7,
            "test_data__responses_per_prompt": 2,
            "rollout__test_sampling_params__temperature": 1.0,
        },
    ),
    "ranks, entropy, small batches": (
        "spo", 2, {"actor__loss__name": "rank_jsd", "actor__loss__max_rank": 4,
                   "actor__entropy__coef": 0.01, "rollout__max_batch_size": 5},
    ),
    "environment in the trainer": ("spo", 2, AHEAD | {"rollout__env_workers": 0}),
    "sequence-parallel": ("spo", 2, {"actor__sp_size": 2}),
    "tensor-parallel": ("spo", 2, {"actor__tp_size": 2}),
    "replicated": ("spo", 2, AHEAD | {"actor__ddp_size": 2}),
}  # fmt: skip
SOME = ["critic, adapters, ahead, beside", "drawn again, ahead", "turns, ahead, beside"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    write_env(files / "talk.py", CONVERSATION)
    if not LONG:
        return files
    write_model(files / "other", std=0.3)
    write_pairs(files / "pairs.jsonl")
    write_pairs(files / "labels.jsonl", labelled=True)
    rows = [{"prompt": f"{i} + 1 = ", "extra_info": {"answer": "4" * (i % 5)}} for i in range(24)]
    (files / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AutoConfig.from_pretrained(files / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(files / "scores")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(files / "scores")
    return files


def start(files, kind, folder, **changes):
    trainer, n_ranks, own = KINDS[kind]
    changes = COMMON | (ROWS if trainer in ON_ROWS else ROLLOUTS) | own | changes
    for key, value in changes.items():
        if (files / str(value)).exists():
            changes[key] = files / value
    return Run(files, trainer, folder, n_ranks, **changes)


def has_begun(kind, folder, step):
    """Whether the answers of a step are there, or for rows the metrics of the one before."""
    if KINDS[kind][0] not in ON_ROWS:
        return (folder / f"rollouts/step{step:06d}_train.jsonl").exists()
    metrics = folder / "metrics.jsonl"  # of step 0, too
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= step


@pytest.mark.parametrize("kind", [*KINDS] if LONG else SOME)
def test_killed_stopped_and_resumed(files, tmp_path, kind):
    chance = random.Random(kind)
    whole = start(files, kind, tmp_path / "whole")
    whole.finish()
    folder = tmp_path / "run"
    run = start(files, kind, folder)
    numbers = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)
    for number, step in zip(numbers, sorted(chance.sample(range(2, 7), 4)), strict=True):
        while not has_begun(kind, folder, step) and run.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        if number == signal.SIGKILL:
            run.kill()
        else:
            for process in run.ranks:
                process.terminate()
            codes = {*run.wait()}  # which ends the others with the first, as torchrun does
            # -number: one that was starting did not listen yet, and its peer may have failed by it.
            assert -number in codes or codes <= {0, 128 + number, -signal.SIGKILL}, run.output()
        assert_nothing_half(folder)
        run = start(files, kind, folder, trainer__load_ckpt_from="latest")
    run.finish()
    assert_same_run(folder, whole.folder)
