"""Killed with -9 at any point and resumed, a run is the run that was not."""

import random
import time

import pytest

from RL2.trainer.checkpoint import Checkpoints, damage
from tests.faults.support import Run, points
from tests.trainer.support import (
    checkpoint_weights,
    lasting,
    rows_of,
    same_weights,
    weights,
    write_files,
    write_model,
)

# Six steps of an epoch of three, each saved, so that old checkpoints are removed, too. Dropout:
# what is computed depends on the random generator's state.
SETTINGS = {
    "trainer__n_epochs": 2, "trainer__save_freq": 1, "trainer__keep_last": 2,
    "actor__scheduler": "cosine", "actor__warmup_ratio": 0.3, "actor__lr": "1e-2",
}  # fmt: skip
TRAINERS = ("sft", "spo")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    write_model(files / "dropout", "gpt2", std=0.2)
    return files


def settings(files, trainer):
    if trainer == "sft":
        return SETTINGS | {"actor__model_name": files / "dropout"}
    return SETTINGS


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Call with (trainer, ranks): a run that nobody disturbs, and its seconds."""
    runs = {}

    def run(trainer, n_ranks):
        if (trainer, n_ranks) not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            start = time.monotonic()
            one = Run(files, trainer, folder, n_ranks, **settings(files, trainer))
            one.finish()
            runs[trainer, n_ranks] = one, time.monotonic() - start
        return runs[trainer, n_ranks]

    return run


def assert_nothing_half(folder):
    for checkpoint in Checkpoints(folder).steps():
        assert damage(checkpoint) is None


def assert_same(folder, expected):
    rows = [lasting(row) for row in rows_of(folder)]
    assert rows == [lasting(row) for row in rows_of(expected)]
    assert same_weights(weights(folder / "final"), weights(expected / "final"))
    steps = Checkpoints(folder).steps()
    assert [path.name for path in steps] == ["step000006", "step000005"]
    one, other = (checkpoint_weights(run / "checkpoints/step000006") for run in (folder, expected))
    assert same_weights(one, other)
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(left) == ["latest", "step000005", "step000006"]


def resume(files, trainer, folder, n_ranks, **changes):
    return Run(
        files, trainer, folder, n_ranks, trainer__load_ckpt_from="latest",
        **settings(files, trainer), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("seed", points(few=3, many=20))
def test_killed_within_a_save(files, whole, tmp_path, seed):
    """Data, manifest, renaming, removing: wherever the file system is asked for something."""
    chance = random.Random(seed)
    trainer, n_ranks = chance.choice(TRAINERS), 1 + seed % 2
    one, _ = whole(trainer, n_ranks)
    mortal = chance.randrange(n_ranks)
    die_at = chance.randrange(1, 1 + one.events(mortal))
    folder = tmp_path / "run"
    killed = Run(
        files, trainer, folder, n_ranks, die_at=die_at, mortal=mortal, **settings(files, trainer)
    )
    assert killed.wait()[mortal] == -9
    assert_nothing_half(folder)
    resume(files, trainer, folder, n_ranks).finish()
    assert_same(folder, one.folder)


@pytest.mark.parametrize("seed", points(few=2, many=30))
def test_killed_at_any_time_and_killed_again(files, whole, tmp_path, seed):
    chance = random.Random(1000 + seed)
    trainer, n_ranks = chance.choice(TRAINERS), 1 + seed % 2
    one, seconds = whole(trainer, n_ranks)
    folder = tmp_path / "run"
    run = Run(files, trainer, folder, n_ranks, **settings(files, trainer))
    for _ in range(2):
        time.sleep(chance.uniform(0, seconds))
        run.kill()
        assert_nothing_half(folder)
        run = resume(files, trainer, folder, n_ranks)
    run.finish()
    assert_same(folder, one.folder)
