"""Ranks that were not started with the same: one line, and no step of a mixture of two runs."""

import shutil
import subprocess
import sys
import time

import pytest

from RL2.engines.servers.addresses import free_port
from tests.faults.support import LONG, Run
from tests.trainer.support import environ, overrides, rows_of, write_files, write_rows

STEPS = {"trainer__max_steps": 1}
long = pytest.mark.skipif(not LONG, reason="long: bash tests/run.sh faults")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def ends_with(files, tmp_path, **of_rank_1):
    """What the ranks say, all of which end by themselves."""
    run = Run(files, "spo", tmp_path / "run", 2, of_rank={1: of_rank_1}, **STEPS)
    start = time.monotonic()
    codes = run.wait(60, end_others=False)
    assert time.monotonic() - start < 30  # not the minutes after which ranks give each other up
    assert codes == [1, 1]
    assert not (tmp_path / "run").exists()
    return run.output()


def test_another_command(files, tmp_path):
    """A run of two learning rates, or one that waits for steps that the other does not take."""
    text = ends_with(files, tmp_path, actor__lr=2e-3, trainer__max_steps=2)
    assert text.count("actor.lr: rank 0 on ") == 2
    assert " has 0.001, rank 1 on " in text and " has 0.002 (and trainer.max_steps); " in text


def test_other_files_under_the_same_command(files, tmp_path):
    """As where each machine has files of its own under one path."""
    other = write_rows(tmp_path / "rows.jsonl", 23)
    text = ends_with(files, tmp_path, train_data__path=other)
    assert text.count("ConfigError: train_data.path: rank 0 on ") == 2
    assert " has 24 rows of " in text and " has 23 rows of " in text


def test_a_rank_whose_own_files_are_bad_ends_all(files, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{\n")
    text = ends_with(files, tmp_path, train_data__path=tmp_path / "rows.jsonl")
    assert text.count("\nDataError: train_data.path: ") == 1
    assert text.count("TrainingError: not started, as another rank ends: rank 1 on ") == 1
    assert text.count("rows.jsonl:1:2: not JSON") == 2


def test_the_same_files_elsewhere(files, tmp_path):
    for name in ("model", "rows.jsonl", "env.py"):
        copy = shutil.copytree if name == "model" else shutil.copy
        copy(files / name, tmp_path / name)
    own = {
        "actor__model_name": tmp_path / "model",
        "train_data__path": tmp_path / "rows.jsonl",
        "rollout__env_path": tmp_path / "env.py",
        "rollout__env_workers": 1,
        "trainer__use_wandb": "false",
    }
    Run(files, "spo", tmp_path / "run", 2, of_rank={1: own}, **STEPS).finish()
    assert len(rows_of(tmp_path / "run")) == 1


@long
@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_value_on_one_machine_ends_the_others(files, tmp_path, bad):
    """By the real command, one process a machine. They waited for ten minutes."""
    port, ranks = free_port(), []
    for rank in range(2):
        place = {
            "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        lines = overrides(files, "spo", tmp_path / "run", actor__lr=2 if rank == bad else 1e-3)
        command = [sys.executable, "-m", "RL2.trainer.spo", *lines]
        variables = environ(**{name: str(value) for name, value in place.items()})
        ranks.append(
            subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True,
                             stdin=subprocess.DEVNULL)
        )  # fmt: skip
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert said[bad].startswith("ConfigError: actor.lr=2.0: must be above 0 and below 1")
    other = f"TrainingError: not started, as another rank ends: rank {bad} on "
    assert said[1 - bad].startswith(other) and "ConfigError: actor.lr=2.0: " in said[1 - bad]
