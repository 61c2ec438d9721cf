"""Ranks that do not share the run's folder are noticed before anything is trained."""

import threading
import time

import pytest

from RL2.distributed import rank
from RL2.runtime.errors import ConfigError
from RL2.trainer import loop
from RL2.trainer.startup.shared_folder import _appears, check_shared
from tests.ranks import run_on_ranks
from tests.trainer.support import train, write_files


def checked(folders):
    """What this rank is told."""
    try:
        check_shared(folders[rank()], patience=0.3)
    except ConfigError as error:
        return str(error)
    return None


def test_one_folder_is_shared_and_nothing_stays_in_it(tmp_path):
    folder = str(tmp_path / "new/run")
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    assert run_on_ranks(2, checked, [folder, str(tmp_path / "link/run")]) == [None, None]
    assert not (tmp_path / "new/run").exists()  # a run that is refused later leaves nothing
    (tmp_path / "new/run").mkdir()
    assert run_on_ranks(2, checked, [folder, folder]) == [None, None]
    assert not [*(tmp_path / "new/run").iterdir()]


def test_two_folders_of_one_name_are_named_on_all_ranks(tmp_path):
    folders = [str(tmp_path / name) for name in "ab"]
    one, other = run_on_ranks(2, checked, folders)
    for text, folder in ((one, "a"), (other, "b")):
        assert text.startswith(f"trainer.save_dir={tmp_path / folder}: rank 1 (")
        assert f"there {tmp_path / 'b'}) does not see the files of rank 0 (" in text
        assert text.endswith("that all machines share, by an absolute path") and "\n" not in text
    assert not [*tmp_path.glob("[ab]/*")]


def test_a_rank_that_may_not_write_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folders = [str(tmp_path / "run"), str(tmp_path / "file/run")]
    for text in run_on_ranks(2, checked, folders):
        assert "rank 1 (" in text and "cannot write to it (Not a directory)" in text


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    def write():
        time.sleep(0.3)
        (tmp_path / "token").write_text("x")

    threading.Thread(target=write).start()
    assert _appears(tmp_path / "token", "x", 30.0)
    assert not _appears(tmp_path / "token", "y", 0.0)


def test_it_comes_before_all_that_takes_time(tmp_path, monkeypatch):
    def refuse(save_dir):
        raise ConfigError(f"asked for {save_dir}")

    def never(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(loop, "check_shared", refuse)
    for name in ("read_inputs", "load_learners"):
        monkeypatch.setattr(loop, name, never)
    with pytest.raises(ConfigError, match=f"asked for {tmp_path / 'run'}"):
        train(write_files(tmp_path), "sft", tmp_path / "run")
