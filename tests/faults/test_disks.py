"""Folders that cannot be written: one line with the path and the bytes, and nothing lost."""

import fcntl
import os
import shutil
import subprocess
import time

import pytest

from RL2.config import ConfigError
from RL2.trainer.checkpoint import Checkpoints, damage
from RL2.trainer.folders import lock
from tests.faults.support import Run
from tests.trainer.support import rows_of, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def small_disk(tmp_path):
    """Call with a size: a file system of that size in memory."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"may not mount: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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
