"""Killed with -9 at any point and resumed, a run is the run that was not."""

import json
import random
import time

import pytest
import torch

from RL2.trainer.checkpoints.checkpoint import Checkpoints
from tests.faults.support import Run, assert_nothing_half, assert_same_run, points
from tests.trainer.support import (
    checkpoint_weights,
    same_weights,
    write_files,
    write_model,
    write_pairs,
)

# Six steps of an epoch of three, each saved, so that old checkpoints are removed, too. Dropout:
# what is computed depends on the random generator's state. Rollouts are also evaluated, so that
# `best` is replaced.
SETTINGS = {
    "trainer__n_epochs": 2, "trainer__save_freq": 1, "trainer__keep_last": 2,
    "actor__scheduler": "cosine", "actor__warmup_ratio": 0.3, "actor__lr": "1e-2",
}  # fmt: skip
AHEAD, BESIDE = {"rollout__staleness": 1}, {"trainer__async_save": "true"}
HELD_OUT = {"data__test_ratio": 0.25, "trainer__test_freq": 2}
KINDS = {
    "sft": ("sft", {}), "spo": ("spo", {}), "ahead": ("spo", AHEAD),
    "beside": ("dpo", BESIDE | HELD_OUT), "both": ("spo", AHEAD | BESIDE),
}  # fmt: skip
TESTED = {"trainer__test_freq": 1, "test_data__max_examples": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    write_model(files / "dropout", "gpt2", std=0.2)
    write_pairs(files / "pairs.jsonl")
    return files


def start(files, kind, folder, n_ranks, **changes):
    trainer, own = KINDS[kind]
    if trainer in ("sft", "dpo"):
        own = own | {"actor__model_name": files / "dropout"}
    else:
        own = own | TESTED | {"test_data__path": files / "rows.jsonl"}
    return Run(files, trainer, folder, n_ranks, **SETTINGS, **own, **changes)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Call with (kind, ranks): a run that nobody disturbs, and its seconds."""
    runs = {}

    def run(kind, n_ranks):
        if (kind, n_ranks) not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            begin = time.monotonic()
            one = start(files, kind, folder, n_ranks)
            one.finish()
            runs[kind, n_ranks] = one, time.monotonic() - begin
        return runs[kind, n_ranks]

    return run


def assert_same(folder, expected):
    assert_same_run(folder, expected)
    steps = Checkpoints(folder).steps()
    assert [path.name for path in steps] == ["step000006", "step000005"]
    one, other = (checkpoint_weights(run / "checkpoints/step000006") for run in (folder, expected))
    assert same_weights(one, other)
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(left) == ["latest", "step000005", "step000006"]


def resume(files, kind, folder, n_ranks):
    return start(files, kind, folder, n_ranks, trainer__load_ckpt_from="latest")


@pytest.mark.parametrize("seed", points(few=4, many=25))
def test_killed_within_a_save(files, whole, tmp_path, seed):
    """Data, manifest, renaming, removing, models, metrics, rollouts: wherever the file system is
    asked for something."""
    chance = random.Random(seed)
    kind, n_ranks = chance.choice([*KINDS]), 1 + seed % 2
    one, _ = whole(kind, n_ranks)
    mortal = chance.randrange(n_ranks)
    die_at = chance.randrange(1, 1 + one.events(mortal))
    folder = tmp_path / "run"
    killed = start(files, kind, folder, n_ranks, die_at=die_at, mortal=mortal)
    assert killed.wait()[mortal] == -9
    assert_nothing_half(folder)
    resume(files, kind, folder, n_ranks).finish()
    assert_same(folder, one.folder)


@pytest.mark.parametrize("seed", points(few=3, many=30))
def test_killed_at_any_time_and_killed_again(files, whole, tmp_path, seed):
    chance = random.Random(1000 + seed)
    kind, n_ranks = chance.choice([*KINDS]), 1 + seed % 2
    one, seconds = whole(kind, n_ranks)
    folder = tmp_path / "run"
    run = start(files, kind, folder, n_ranks)
    for _ in range(2):
        time.sleep(chance.uniform(0, seconds))
        run.kill()
        assert_nothing_half(folder)
        run = resume(files, kind, folder, n_ranks)
    run.finish()
    assert_same(folder, one.folder)


PARTIAL = {
    "rollout__partial_rollout": "true", "rollout__over_sampling": 6, "trainer__n_epochs": 2,
    "rollout__max_batch_size": 16, "trainer__save_freq": 1, "train_data__prompts_per_rollout": 4,
    "rollout__train_sampling_params__max_new_tokens": 40,
}  # fmt: skip


@pytest.mark.parametrize("seed", points(few=1, many=10))
def test_partial_rollouts_lose_no_prompt_and_train_none_twice(files, tmp_path, seed):
    """Which samples come first depends on time, so another run is another run."""
    chance = random.Random(2000 + seed)
    folder, resumed = tmp_path / "run", {}
    for last in (chance.randrange(1, 6), chance.randrange(6, 12), 12):
        run = Run(files, "spo", folder, chance.choice([1, 2]), **PARTIAL, **resumed)
        resumed = {"trainer__load_ckpt_from": "latest"}
        if last < 12:
            run.kill_at(folder / f"checkpoints/step{last:06d}")
        else:
            run.finish()
    texts = [json.loads(line)["prompt"] for line in (files / "rows.jsonl").open()]
    done = []
    for step in range(1, 13):
        lines = (folder / f"rollouts/step{step:06d}_train.jsonl").read_text().splitlines()
        done += [json.loads(line)["prompt"] for line in lines]
    state = torch.load(folder / "checkpoints/step000012/rank0.pt", weights_only=True)["source"]
    begun = [group["index"] for rank in state for group in rank["rollout"]["carried"]]
    assert len(done) == 48 and len(begun) == 6
    done += [texts[index] for index in begun]
    # two epochs of 24 prompts, and 6 of the third
    assert len(done) == 54 and {done.count(text) for text in texts} == {2, 3}
