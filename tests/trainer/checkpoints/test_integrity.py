"""Damaged, unreadable and different are three things, on one rank and on two."""

import errno
import os
import shutil

import pytest

from RL2.distributed import rank
from RL2.runtime.errors import CheckpointError
from RL2.trainer.checkpoints import manifest
from RL2.trainer.checkpoints.integrity import damage, damage_on_all_ranks
from tests.ranks import run_on_ranks

KEY = "trainer.load_ckpt_from=latest"


def write(folder, text="abc", n_ranks=2):
    folder.mkdir()
    names = [".metadata", "trainer.json", *(f"rank{i}.pt" for i in range(n_ranks))]
    for name in names:
        (folder / name).write_text(f"{name} {text}")
    paths = [folder / name for name in names]
    manifest.write(folder, manifest.fingerprints(paths, folder), {"world_size": n_ranks})
    return folder


def judged(folders):
    try:
        return damage_on_all_ranks(folders[rank()], KEY)
    except CheckpointError as error:
        return f"error: {error}"


def seen_by_two(tmp_path, change):
    """What both ranks are told where the second one sees a checkpoint with a change."""
    one = write(tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    change(other)
    return run_on_ranks(2, judged, [one, other])


def test_a_good_one_and_a_damaged_one(tmp_path):
    folder = write(tmp_path / "one")
    assert run_on_ranks(2, judged, [folder, folder]) == [None, None]
    for name in ("rank0.pt", "trainer.json"):  # of either rank's share
        (folder / name).write_text(f"{name} abd")
        reasons = run_on_ranks(2, judged, [folder, folder])
        assert reasons == [f"{name} is damaged: its SHA-256 is not that of manifest.json"] * 2
        (folder / name).write_text(f"{name} abc")
    (folder / "rank1.pt").unlink()
    assert run_on_ranks(2, judged, [folder, folder]) == ["rank1.pt is missing"] * 2


def _other_run(folder):
    shutil.rmtree(folder)
    write(folder, "other")


DIFFERENT = {
    "a file is missing": (lambda f: (f / "rank1.pt").unlink(), "finds: rank1.pt is missing"),
    # ranks compare every second file: .metadata, rank0.pt | rank1.pt, trainer.json
    "other bytes": (lambda f: (f / "trainer.json").write_text("trainer.json abd"),
                    "finds: trainer.json is damaged"),
    "another run's": (_other_run, "finds: another one of that name"),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_only_one_rank_finds_is_no_damage(tmp_path, what):
    change, found = DIFFERENT[what]
    for text in seen_by_two(tmp_path, change):
        assert text.startswith(f"error: {KEY}: {tmp_path}") and "\n" not in text
        assert "is not the same for all ranks: rank 0 (" in text and found in text
        assert text.endswith("it is left as it is: give a folder that all machines share")


def test_a_rank_that_does_not_see_the_folder_is_named(tmp_path):
    for text in seen_by_two(tmp_path, shutil.rmtree):
        assert "cannot be read by rank 1 (" in text
        assert f"{tmp_path / 'other'}: No such file or directory" in text


def _loop(path):
    path.unlink()
    path.symlink_to(path.name)


def _away(path):
    path.unlink()
    path.symlink_to(path.parent / "a disk that is away")


@pytest.mark.parametrize("change", [_loop, _away])
@pytest.mark.parametrize("name", ["rank0.pt", "manifest.json"])
def test_what_cannot_be_looked_at_is_not_damaged(tmp_path, change, name):
    folder = write(tmp_path / "one")
    change(folder / name)
    with pytest.raises(OSError, match=name):
        damage(folder)
    (text,) = run_on_ranks(1, judged, [folder])
    assert text.startswith(f"error: {KEY}: {folder} cannot be read: {folder / name}: ")
    assert "make it readable and repeat the command" in text


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),  # gone since it was listed
        MemoryError("no memory"),
    ],
    ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")),
)
@pytest.mark.parametrize("where", ["read", "list"])
def test_no_error_of_the_system_is_damage(tmp_path, monkeypatch, error, where):
    folder = write(tmp_path / "one")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(manifest, "_sha256" if where == "read" else "_sizes", fails)
    with pytest.raises(type(error)):
        damage(folder)
    (text,) = run_on_ranks(1, judged, [folder])
    assert "cannot be read: " in text and (getattr(error, "strerror", None) or "no memory") in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_looked_into(tmp_path):
    folder = write(tmp_path / "one")
    folder.chmod(0)
    try:
        with pytest.raises(PermissionError):
            damage(folder)
    finally:
        folder.chmod(0o755)
