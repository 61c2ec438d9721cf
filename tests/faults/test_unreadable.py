"""What cannot be read now, or is lost, is said each time, and no run starts at step 1 for it."""

import logging
import os
import shutil

import pytest

from RL2.runtime.errors import CheckpointError
from RL2.trainer.checkpoints import contents, writing
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from tests.trainer.support import rows_of, train, write_files

SETTINGS = {"trainer__max_steps": 2, "trainer__save_freq": 1}
LATEST = {"trainer__load_ckpt_from": "latest"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def saved(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    train(files, "sft", folder, **SETTINGS)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run", symlinks=True)


def tree(folder):
    """All names below a folder, and what lies under them."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name not in (".lock", "run.json")
    }


def refused_the_same(files, run, times=2, **changes):
    """The line that a run ends with, each time that it is repeated; nothing is changed."""
    before, lines = tree(run), set()
    for _ in range(times):
        with pytest.raises(CheckpointError) as caught:
            train(files, "sft", run, **SETTINGS | LATEST | changes)
        lines.add(str(caught.value))
        assert tree(run) == before
    (line,) = lines
    assert "\n" not in line
    return line


def flip(checkpoint):
    path = next(checkpoint.glob("__0_*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------ nothing good left


def test_where_all_are_damaged_the_error_is_the_same_until_they_are_moved_away(files, run):
    for step in (1, 2):
        flip(run / f"checkpoints/step{step:06d}")
    line = refused_the_same(files, run, times=3)
    assert line.startswith("trainer.load_ckpt_from=latest: none of 2 checkpoints under ")
    assert "(step000002: __0_0.distcp is damaged" in line
    assert line.endswith(f"move all of {run / 'checkpoints'} away to start anew")
    (run / "checkpoints").rename(run / "kept")
    assert [row["step"] for row in train(files, "sft", run, **SETTINGS | LATEST)] == [1, 2]


def test_what_was_set_apart_before_is_not_forgotten(files, run):
    """As a run leaves it that was killed, or an earlier version did."""
    shutil.rmtree(run / "checkpoints/step000001")
    (run / "checkpoints/step000002").rename(run / "checkpoints/damaged-step000002")
    assert "none of 1 checkpoints" in refused_the_same(files, run)


def test_a_checkpoint_that_went_away_is_missed(files, run):
    for step in (1, 2):
        shutil.rmtree(run / f"checkpoints/step{step:06d}")
    line = refused_the_same(files, run)
    assert "checkpoints/latest names step000002, which is not there; move all of" in line


def test_without_latest_a_run_starts_anew_all_the_same(files, run):
    for step in (1, 2):
        flip(run / f"checkpoints/step{step:06d}")
    assert len(train(files, "sft", run, **SETTINGS)) == 2
    assert (run / "before1/checkpoints/step000002").exists()


# ------------------------------------------------------------------------------ not readable now


def _loop(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("what", [
    "checkpoints/step000002/rank0.pt", "checkpoints/step000002/manifest.json",
    "checkpoints/step000002/config.yaml", "checkpoints/step000002", "checkpoints",
])  # fmt: skip
def test_what_cannot_be_read_ends_the_run_and_nothing_is_touched(files, run, what):
    """A link in a circle is what also root cannot read. The checkpoint before is good."""
    _loop(run / what)
    line = refused_the_same(files, run)
    assert line.startswith("trainer.load_ckpt_from=latest: ") and " cannot be " in line
    assert f"{run / what}: Too many levels of symbolic links" in line
    assert "repeat the command" in line


@pytest.mark.parametrize("what", ["checkpoints/step000002", "checkpoints"])
def test_a_link_to_a_disk_that_is_away_is_not_nothing(files, run, tmp_path, what):
    (run / what).rename(tmp_path / "disk")
    (run / what).symlink_to(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    assert "No such file or directory" in refused_the_same(files, run)
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    more = SETTINGS | LATEST | {"trainer__max_steps": 3}
    assert [row["step"] for row in train(files, "sft", run, **more)] == [1, 2, 3]
    assert (run / what).is_symlink()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_a_good_one_that_cannot_be_loaded_is_not_skipped(files, run, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(contents.dcp, "load", fails)
    line = refused_the_same(files, run)
    assert "step000002 cannot be loaded (" in line
    assert ("Input/output error" in line) or ("no memory" in line)


def test_metrics_that_cannot_be_read_are_not_overwritten(files, run):
    _loop(run / "metrics.jsonl")
    line = refused_the_same(files, run)
    assert line.startswith(f"trainer.save_dir={run}: {run / 'metrics.jsonl'} is in the way (Too")


# ------------------------------------------------------------------------------ links


def test_old_checkpoints_that_are_links_go_as_links(files, run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for step in (1, 2):
        path = run / f"checkpoints/step{step:06d}"
        path.rename(tmp_path / path.name)
        path.symlink_to(os.path.relpath(tmp_path / path.name, path.parent))
    (run / "final").rename(elsewhere)
    (run / "final").symlink_to(elsewhere)
    before = tree(tmp_path / "step000001"), tree(elsewhere)
    more = SETTINGS | LATEST | {"trainer__max_steps": 3, "trainer__keep_last": 2}
    train(files, "sft", run, **more)
    assert [path.name for path in Checkpoints(run).steps()] == ["step000003", "step000002"]
    train(files, "sft", run, **more | {"trainer__max_steps": 4})
    assert (tree(tmp_path / "step000001"), tree(elsewhere)) == before
    assert not [*run.rglob(".re*")]


def test_a_save_whose_files_rank_0_does_not_find_is_no_checkpoint(files, run, monkeypatch):
    """Rank 1 writes to another disk: DCP's metadata say that its file is there."""
    write = writing._write_part

    def elsewhere(temporary, *arguments):
        written = write(temporary, *arguments)
        (temporary / "rank0.pt").unlink()
        return written

    monkeypatch.setattr(writing, "_write_part", elsewhere)
    monkeypatch.setattr(writing, "PATIENCE", 0.3)
    before = tree(run / "checkpoints")
    with pytest.raises(CheckpointError) as caught:
        train(files, "sft", run, **SETTINGS | LATEST | {"trainer__max_steps": 3})
    line = str(caught.value)
    assert f"trainer.save_dir={run}: rank 0 does not find in {run}/checkpoints/step000003 " in line
    assert "(rank0.pt is missing); give a folder that all machines share" in line
    assert tree(run / "checkpoints") == before


def test_damaged_ones_are_set_apart_once_another_one_is_loaded(files, run, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="RL2")
    flip(run / "checkpoints/step000002")
    with monkeypatch.context() as patch:
        patch.setattr(contents.dcp, "load", lambda *_, **__: 1 / 0)
        assert "step000001 cannot be loaded (division by zero)" in refused_the_same(files, run)
    train(files, "sft", run, **SETTINGS | LATEST)
    assert (run / "checkpoints/damaged-step000002").is_dir()
    assert [row["step"] for row in rows_of(run)] == [1, 2]
