"""Folders that cannot be written: one line with the path and the bytes, and nothing lost."""

import fcntl
import os
import re
import shutil
import subprocess
import time

import pytest

from RL2.runtime.errors import ConfigError
from RL2.runtime.folders import lock
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.integrity import damage
from tests.faults.support import Run
from tests.trainer.support import (
    ENVIRONMENT,
    lasting,
    rows_of,
    same_weights,
    weights,
    write_env,
    write_files,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def failure(run):
    """The one line of a run that failed, and how long it took."""
    start = time.monotonic()
    codes = run.wait(timeout=60)
    assert any(code == 1 for code in codes)
    lines = [line for line in run.output().splitlines() if "Error: " in line]
    return lines[-1], time.monotonic() - start


CASES = [(1, "false"), (2, "false"), (2, "true")]


@pytest.mark.parametrize(("n_ranks", "beside"), CASES)
def test_a_disk_that_is_full_before_a_save(files, small_disk, n_ranks, beside, tmp_path):
    """The third checkpoint of about 250 KiB finds no room."""
    folder = small_disk("900k") / "run"
    changes = {
        "trainer__save_freq": 1, "trainer__dump_rollouts": "false", "trainer__async_save": beside,
    }  # fmt: skip
    line, _ = failure(Run(files, "spo", folder, n_ranks, logs=tmp_path, **changes))
    assert line.startswith("CheckpointError: trainer.save_dir=")
    assert "step00000" in line and "bytes are needed" in line and "are free" in line
    steps = Checkpoints(folder).steps()
    assert steps and all(damage(path) is None for path in steps)
    assert not list((folder / "checkpoints").glob(".*-step*"))


@pytest.mark.parametrize(("n_ranks", "beside"), CASES)
def test_a_disk_that_fills_while_a_save_is_written(files, small_disk, n_ranks, beside, tmp_path):
    """Another process takes the room that was there when the save began."""
    disk = small_disk("1500k")
    folder = disk / "run"
    hog = tmp_path / "hog.py"
    hog.write_text(HOG.format(ballast=str(disk / "ballast")))
    changes = {
        "trainer__save_freq": 1, "actor__loss__import_path": f"{hog}:greedy",
        "trainer__dump_rollouts": "false", "trainer__async_save": beside,
    }  # fmt: skip
    line, _ = failure(Run(files, "ppo", folder, n_ranks, logs=tmp_path, **changes))
    assert line.startswith("CheckpointError: trainer.save_dir=")
    assert "are free" in line
    steps = Checkpoints(folder).steps()
    assert steps and all(damage(path) is None for path in steps)


# A loss in whose module the second save finds the disk full as soon as its folder has been made.
HOG = """
import sys

from RL2.algorithms.losses import ppo


def fill(event, arguments):
    if event == "os.mkdir" and ".writing-step000002" in str(arguments[0]):
        with open({ballast!r}, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass


sys.addaudithook(fill)
greedy = ppo
"""


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("size", ["24k", "64k"])
def test_a_disk_without_room_for_anything(files, small_disk, n_ranks, size, tmp_path):
    """Not even for the rollouts and the rows of the metrics, of the second and the sixth step."""
    changes = {"trainer__n_epochs": 4, "test_data__path": files / "rows.jsonl"}
    folder = small_disk(size) / "run"
    run = Run(files, "spo", folder, n_ranks, logs=tmp_path, trainer__test_freq=2, **changes)
    line, seconds = failure(run)
    assert line.startswith("CheckpointError: trainer.save_dir=") and " are free" in line
    assert "Traceback" not in run.output() and seconds < 60


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_disk_without_room_for_the_model(files, small_disk, n_ranks, tmp_path):
    """All that was learned is in the checkpoint; with more room the run comes to its end."""
    changes = {"trainer__max_steps": 2, "trainer__dump_rollouts": "false"}
    whole, disk = tmp_path / "whole", small_disk("10m")
    Run(files, "spo", whole, n_ranks, **changes).finish()
    pages = [-(-path.stat().st_size // 4096) for path in whole.glob("checkpoints/*/*")]
    size = 4096 * (sum(pages) + 12)  # and what is no file of a checkpoint
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    changes["logs"] = tmp_path
    line, _ = failure(Run(files, "spo", disk / "run", n_ranks, **changes))
    assert line.startswith("CheckpointError: trainer.save_dir=") and "/run/final cannot be" in line
    assert "bytes are needed" in line and "; step 2 is in" in line
    assert not list((disk / "run").glob("*final"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    Run(files, "spo", disk / "run", n_ranks, trainer__load_ckpt_from="latest", **changes).finish()
    assert same_weights(weights(disk / "run/final"), weights(whole / "final"))


# Puts a file in the place of the folder of rollouts, once there are three rows of metrics.
HINDRANCE = """
import os
from pathlib import Path

RUN = Path({run!r})


def hinder():
    if not (RUN / "away").exists() and (RUN / "metrics.jsonl").read_text().count("\\n") == 3:
        try:
            os.rename(RUN / "rollouts", RUN / "away")
        except OSError:  # another process was faster
            return
        (RUN / "rollouts").touch()
"""


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("name", ["rollouts/step000003_train.jsonl", "best"])
def test_what_cannot_be_written_stops_a_run_that_is_saved(
    files, small_disk, tmp_path, name, n_ranks
):
    """The same run with more room writes `best`; answers that were trained on are gone, alone."""
    folder, env, disk = tmp_path / "run", tmp_path / "env.py", small_disk("4k")
    changes = {
        "trainer__n_epochs": 3, "test_data__path": files / "rows.jsonl", "trainer__test_freq": 1,
        "actor__lr": "1e-2",
    }  # fmt: skip
    Run(files, "spo", tmp_path / "whole", n_ranks, **changes).finish()
    again = dict(changes)
    folder.mkdir()
    if name == "best":
        (folder / ".writing-best").symlink_to(disk)
    else:
        text = ENVIRONMENT.replace("extra_info):\n", "extra_info):\n    hinder()\n", 1)
        again["rollout__env_path"] = write_env(env, text + HINDRANCE.format(run=str(folder)))
    line, _ = failure(Run(files, "spo", folder, n_ranks, **again))
    assert line.startswith(f"CheckpointError: trainer.save_dir={folder}: {folder}/{name} cannot be")
    (step,) = re.findall(rf"; step (\d+) is in {folder}/checkpoints/step\d+$", line)
    assert "step000003" not in name or step == "3"
    if name == "best":
        (folder / ".writing-best").unlink()
    else:
        (folder / "rollouts").unlink()
        (folder / "away").rename(folder / "rollouts")
    Run(files, "spo", folder, n_ranks, trainer__load_ckpt_from="latest", **changes).finish()
    rows, expected = ([lasting(row) for row in rows_of(f)] for f in (folder, tmp_path / "whole"))
    assert rows == expected
    for last in ("best", "final"):
        assert same_weights(weights(folder / last), weights(tmp_path / "whole" / last))


def test_a_folder_that_may_only_be_read(files, small_disk, tmp_path):
    disk = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    line, seconds = failure(Run(files, "sft", disk / "run", logs=tmp_path))
    assert line.startswith("ConfigError: trainer.save_dir=")
    assert "cannot be written to (Read-only file system)" in line
    assert seconds < 60


def test_two_runs_do_not_write_to_one_folder(files, tmp_path):
    folder = tmp_path / "run"
    with lock(str(folder)):
        line, _ = failure(Run(files, "sft", folder))
        assert line.startswith(f"ConfigError: trainer.save_dir={folder}: process {os.getpid()} on ")
        assert "is writing there" in line
        assert not (folder / "metrics.jsonl").exists()
    Run(files, "sft", folder).finish()
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3]


def test_a_lock_ends_with_its_process(files, tmp_path):
    folder = tmp_path / "run"
    run = Run(files, "spo", folder)
    while not (folder / ".lock").exists() or not (folder / ".lock").read_text():
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=f"process {run.ranks[0].pid} on .* is writing there"):
        lock(str(folder))
    run.kill()
    lock(str(folder)).close()


def test_the_folder_of_a_lock_can_be_moved_away(tmp_path):
    with lock(str(tmp_path / "a")) as file:
        shutil.move(tmp_path / "a", tmp_path / "b")
        with lock(str(tmp_path / "a")):
            pass
        assert not file.closed
    with (tmp_path / "b/.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
