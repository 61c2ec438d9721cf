"""A folder under its name is whole, whatever happened on the way there."""

import os
import signal
import subprocess
import sys

import pytest

from RL2.runtime.folders import REMOVED, REPLACED, TEMPORARY, clean, free_name, publish
from RL2.trainer.checkpoints.checkpoint import Checkpoints

# Publishes a folder and kills itself, as `kill -9` does, when it asks the file system for the so
# manyth thing.
MORTAL = """
import os, signal, sys
from pathlib import Path
from RL2.runtime.folders import publish

root, die_at, seen = Path(sys.argv[1]), int(sys.argv[2]), 0
CHANGES = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open"}

def watch(event, arguments):
    global seen
    if event in CHANGES and str(root) in str(arguments[0]):
        seen += 1
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
publish(root / ".writing-best", root / "best")
print(seen)
"""


def write(folder, text):
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        (folder / name).write_text(text)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def publish_and_die(root, die_at):
    write(root / "best", "old")
    write(root / ".writing-best", "new")
    return subprocess.run(
        [sys.executable, "-c", MORTAL, str(root), str(die_at)], capture_output=True, text=True
    )


def test_a_replacement_broken_off_anywhere_leaves_one_of_the_two(tmp_path):
    done = publish_and_die(tmp_path / "whole", 0)
    assert done.returncode == 0, done.stderr
    n_changes, seen = int(done.stdout), set()
    assert content(tmp_path / "whole/best") == {"one": "new", "two": "new"}
    for die_at in range(1, n_changes + 1):
        root = tmp_path / str(die_at)
        assert publish_and_die(root, die_at).returncode == -signal.SIGKILL
        clean(root)
        assert [path.name for path in root.iterdir()] == ["best"]
        (text,) = {*content(root / "best").values()}
        assert len(content(root / "best")) == 2
        seen.add(text)
    assert seen == {"old", "new"}


def test_what_was_left_half_written_or_half_removed_goes(tmp_path):
    for prefix in (TEMPORARY, REMOVED):
        write(tmp_path / f"{prefix}step000001", "half")
    write(tmp_path / f"{REPLACED}best", "old")
    write(tmp_path / "best", "new")
    write(tmp_path / f"{REPLACED}final", "old")
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "final"]
    assert content(tmp_path / "best")["one"] == "new"


def test_publishing_again_after_a_rename_that_failed(tmp_path, monkeypatch):
    write(tmp_path / "best", "old")
    write(tmp_path / ".writing-best", "new")
    rename = os.rename

    def broken(source, target, **kwargs):
        if ".writing" in str(source):
            raise OSError("the disk went away")
        rename(source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", broken)
        with pytest.raises(OSError, match="went away"):
            publish(tmp_path / ".writing-best", tmp_path / "best")
    publish(tmp_path / ".writing-best", tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert content(tmp_path / "best")["one"] == "new"


def test_free_names(tmp_path):
    for expected in ("damaged-x", "damaged-x-2", "damaged-x-3"):
        name = free_name(tmp_path / "x", "damaged-")
        assert name == expected
        (tmp_path / name).mkdir()


def test_copies_are_no_checkpoints_of_the_run(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep_last=2)
    for name in ("step000002", "step999999", "step1000000", "step000003 copy", "step000004.tar",
                 "step5", "damaged-step000006"):  # fmt: skip
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints.steps()] == [
        "step1000000",
        "step999999",
        "step000002",
    ]
    checkpoints.tidy()
    assert (tmp_path / "checkpoints/latest").read_text() == "step1000000"
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["damaged-step000006", "latest", "step000003 copy", "step000004.tar",
                    "step1000000", "step5", "step999999"]  # fmt: skip


def test_no_name_for_what_is_set_aside_is_taken_twice(tmp_path):
    """Also where somebody has deleted one of them."""
    for name in ("before2", "checkpoints/step000001"):
        (tmp_path / name).mkdir(parents=True)
    for expected in ("before1", "before3"):
        (tmp_path / "metrics.jsonl").write_text("")
        Checkpoints(str(tmp_path)).set_aside(0)
        assert (tmp_path / expected / "metrics.jsonl").exists()
    assert not [*(tmp_path / "before2").iterdir()]
