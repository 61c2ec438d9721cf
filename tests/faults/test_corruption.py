"""Checkpoints that were damaged after they were written are noticed before they are loaded."""

import json
import os
import random
import shutil

import pytest

from RL2.trainer.checkpoints import manifest
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.integrity import damage
from tests.faults.support import Run
from tests.trainer.support import rows_of, same_weights, weights, write_files

N = 200


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def saved(files, tmp_path_factory):
    """A run of two ranks with a checkpoint of each of its three steps."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    Run(files, "spo", folder, 2, trainer__save_freq=1).finish()
    return folder


def flip(folder, chance):
    path = chance.choice([path for path in folder.iterdir() if path.stat().st_size])
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(folder, chance):
    path = chance.choice([path for path in folder.iterdir() if path.stat().st_size])
    os.truncate(path, chance.randrange(path.stat().st_size))


def lengthen(folder, chance):
    with chance.choice([*folder.iterdir()]).open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 100)))


def delete(folder, chance):
    chance.choice([*folder.iterdir()]).unlink()


def swap(folder, chance):
    """Two files of ranks change places: sizes may be equal, and both are good files."""
    kind = chance.choice(["__{}_0.distcp", "rank{}.pt"])
    one, other = (folder / kind.format(rank) for rank in range(2))
    one.rename(folder / "between")
    other.rename(one)
    (folder / "between").rename(other)


def from_another_step(folder, chance):
    """A file of the checkpoint before, of one size and format."""
    before = folder.with_name("step000001")
    name = chance.choice([path.name for path in before.iterdir() if path.name != manifest.NAME])
    if (before / name).read_bytes() == (folder / name).read_bytes():
        name = "trainer.json"
    shutil.copy(before / name, folder / name)


def noise(folder, chance):
    path = chance.choice([*folder.iterdir()])
    path.write_bytes(chance.randbytes(path.stat().st_size))


def stray(folder, chance):
    (folder / f"__{chance.randrange(2, 9)}_0.distcp").write_bytes(b"")


def _edit(change):
    def forge(folder, chance):
        path = folder / manifest.NAME
        content = json.loads(path.read_text())
        change(content, chance)
        path.write_text(json.dumps(content))

    return forge


def _forget(content, chance):
    del content["files"][chance.choice([*content["files"]])]


def _resize(content, chance):
    content["files"][chance.choice([*content["files"]])]["bytes"] += 1


def _rehash(content, chance):
    content["files"][chance.choice([*content["files"]])]["sha256"] = "0" * 64


def _add(content, chance):
    name = chance.choice(["../step000001/trainer.json", "/etc/passwd", "rank9.pt"])
    content["files"][name] = {"bytes": 1, "sha256": "0" * 64}


def _drop(content, chance):
    del content[chance.choice([*content])]


def _retype(content, chance):
    content[chance.choice([*content])] = chance.choice([None, 1, [], "x", {"a": 1}])


def _more_ranks(content, chance):
    content["about"]["world_size"] = chance.choice([1, 3, "2", None])


FORGERIES = [
    _edit(change) for change in (_forget, _resize, _rehash, _add, _drop, _retype, _more_ranks)
]


def forge(folder, chance):
    chance.choice(FORGERIES)(folder, chance)


def forge_with_digest(folder, chance):
    """A forger who knows the format: files are left out, and the digest fits."""
    path = folder / manifest.NAME
    content = json.loads(path.read_text())
    del content["files"][chance.choice([*content["files"]])]
    manifest.write(folder, content["files"], content["about"])


DAMAGES = [
    flip, flip, flip, truncate, lengthen, delete, swap, from_another_step, noise, stray, forge,
    forge_with_digest,
]  # fmt: skip


def test_every_damage_is_noticed(saved, tmp_path):
    """200 of them; the message is one line that says what it was."""
    for seed in range(N):
        chance = random.Random(seed)
        copy = tmp_path / str(seed)
        shutil.copytree(saved / "checkpoints", copy)
        folder = copy / "step000002"
        assert damage(folder) is None
        what = DAMAGES[seed % len(DAMAGES)]
        what(folder, chance)
        reason = damage(folder)
        assert reason and "\n" not in reason, f"seed {seed}: {what.__name__} went unnoticed"
        shutil.rmtree(copy)


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("what", [flip, swap, delete, forge])
def test_the_one_before_is_used_and_the_damaged_one_set_apart(
    files, saved, tmp_path, what, n_ranks
):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "checkpoints/step000003")
    what(folder / "checkpoints/step000002", random.Random(0))
    run = Run(files, "spo", folder, n_ranks, trainer__load_ckpt_from="latest")
    run.finish()
    lines = [line for line in run.output().splitlines() if "does not load" in line]
    assert len(lines) == 1 and "step000002 does not load" in lines[0]
    assert "damaged-step000002" in lines[0] and "trying the one before" in lines[0]
    assert (folder / "checkpoints/damaged-step000002").is_dir()
    assert [path.name for path in Checkpoints(folder).steps()] == ["step000003", "step000001"]
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3]
    if n_ranks == 2:
        assert same_weights(weights(folder / "final"), weights(saved / "final"))


def test_a_named_one_that_is_damaged_is_an_error_and_stays(files, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    which = folder / "checkpoints/step000002"
    flip(which, random.Random(0))
    run = Run(files, "spo", folder, trainer__load_ckpt_from=which)
    assert run.wait() == [1]
    assert f"trainer.load_ckpt_from={which}" in run.output()
    assert "name another checkpoint, or use latest" in run.output()
    assert which.is_dir()
