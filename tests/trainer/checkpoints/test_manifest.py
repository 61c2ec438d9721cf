"""What a manifest says, and what it notices; real checkpoints: tests/faults/test_corruption.py."""

import hashlib

import pytest

from RL2.trainer.checkpoints import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "below/b").write_bytes(b"")
    paths = [tmp_path / "a", tmp_path / "below/b"]
    manifest.write(tmp_path, manifest.fingerprints(paths, tmp_path), {"step": 3})
    return tmp_path


def test_it_has_sizes_and_digests(folder):
    content = manifest.read(folder, required=["a"])
    assert content["about"] == {"step": 3}
    assert content["files"]["a"] == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert [*content["files"]] == ["a", "below/b"]
    manifest.verify(folder, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is not readable"),
        (lambda f: (f / "a").unlink(), "a is missing"),
        (lambda f: (f / "a").write_bytes(b"ab"), "a has 2 bytes, not 3"),
        (lambda f: (f / "c").write_bytes(b""), "c is not in its manifest.json"),
    ],
)
def test_names_and_sizes_are_compared(folder, change, message):
    change(folder)
    with pytest.raises(manifest.Damaged, match=f"^{message}$"):
        manifest.read(folder)


def test_a_changed_manifest_is_noticed(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(manifest.Damaged, match="manifest.json was changed"):
        manifest.read(folder)


def test_what_is_required_has_to_be_there(folder):
    with pytest.raises(manifest.Damaged, match="c is missing"):
        manifest.read(folder, required=["c"])


def test_ranks_share_the_reading(folder):
    content = manifest.read(folder)
    (folder / "a").write_bytes(b"abd")
    with pytest.raises(manifest.Damaged, match="a is damaged: its SHA-256"):
        manifest.verify(folder, content, slice(0, None, 2))
    manifest.verify(folder, content, slice(1, None, 2))
