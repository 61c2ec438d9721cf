"""What is in a run's way is moved whole, or named and left."""

import errno
import os

import pytest

from RL2.runtime.errors import CheckpointError
from RL2.trainer.checkpoints.aside import set_aside
from tests.trainer.support import rows_of, train, write_files

NAMES = ("checkpoints", "best", "final", "rollouts", "metrics.jsonl")


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    for name in NAMES[:-1]:
        (run / name).mkdir(parents=True)
        (run / name / "file").write_text(name)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


@pytest.fixture
def stuck(monkeypatch):
    """Call with a name: what is called so cannot be renamed, as a mount cannot."""
    rename = os.rename

    def hold(name):
        def renamed(source, target, **options):
            if os.path.basename(source) == name:
                raise OSError(errno.EBUSY, "Device or resource busy", os.fspath(source))
            rename(source, target, **options)

        monkeypatch.setattr(os, "rename", renamed)

    return hold


@pytest.mark.parametrize("name", NAMES)
def test_where_one_cannot_be_moved_none_is(run, stuck, name):
    before = sorted(run.rglob("*"))
    stuck(name)
    with pytest.raises(OSError, match="busy") as caught:
        set_aside(run, [], 0)
    assert caught.value.filename == str(run / name)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("name", ["best", "final", "rollouts"])
def test_the_line_names_what_is_in_the_way(run, stuck, tmp_path, name):
    stuck(name)
    with pytest.raises(CheckpointError) as caught:
        train(write_files(tmp_path), "sft", run, trainer__max_steps=1)
    assert str(caught.value) == (
        f"trainer.save_dir={run}: {run / name} is in the way (Device or resource busy); let "
        "this user read, write and move it, move it away yourself, or choose another folder"
    )
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_what_the_end_will_replace_is_tried_at_the_start(stuck, tmp_path):
    """The run goes on, and leaves `final` where it is until its end."""
    files, run = write_files(tmp_path), tmp_path / "again"
    train(files, "sft", run, trainer__max_steps=1)
    stuck("final")
    with pytest.raises(CheckpointError, match="/final is in the way .Device or resource busy"):
        train(files, "sft", run, trainer__max_steps=2, trainer__load_ckpt_from="latest")
    assert [row["step"] for row in rows_of(run)] == [1]
    assert (run / "final/model.safetensors").exists()


def test_links_point_to_where_they_did(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/file").write_text("far")
    (run / "checkpoints/step000001").symlink_to("../../disk")
    (run / "best/file").unlink()
    (run / "best").rmdir()
    (run / "best").symlink_to("../disk")
    (run / "final/nothing").symlink_to("nowhere")
    set_aside(run, [], 0)
    for name in ("best", "checkpoints/step000001"):
        assert (run / "before1" / name).is_symlink()
        assert (run / "before1" / name / "file").read_text() == "far"
    assert not (run / "best").exists() and (run / "before1/final/nothing").is_symlink()
