"""A run that was stopped and resumed is the run that was not."""

import json
import logging
import os
import shutil
import signal
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from RL2.runtime.errors import CheckpointError, DataError, TrainingError
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from tests.trainer.support import (
    checkpoint_weights,
    command,
    lasting,
    overrides,
    rows_of,
    same_weights,
    train,
    weights,
    write_files,
    write_model,
    write_rows,
)

# Kills its own process, as `kill -9` does, or raises, at the call that the file `die` names.
MORTAL = """
import os
import signal
from pathlib import Path

DIE = Path(__file__).with_name("die")
calls = 0


def die():
    global calls
    calls += 1
    how, _, when = (DIE.read_text() if DIE.exists() else "").partition(" ")
    if how and calls == int(when):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the machine went away")


def mortal(logps, *, power=1.0):
    if len(logps) > 3:  # a step, not the trial at the start
        die()
    return -power * logps


async def step(state, action, extra_info):
    die()
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""
# Seven steps of an epoch of three: the stop lies in the second epoch. Warm-up and a decay that
# depends on the number of steps; a learning rate at which a lost moment shows at once.
COMMON = {"trainer__n_epochs": 3, "trainer__max_steps": 7, "actor__scheduler": "cosine",
          "actor__warmup_ratio": 0.3, "actor__lr": "1e-2"}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    write_model(files / "dropout", "gpt2", std=0.2)
    (files / "mortal.py").write_text(MORTAL)
    return files


def settings(files, trainer):
    if trainer == "sft":
        # A model with dropout: what it computes depends on the random generator's state.
        return COMMON | {
            "actor__model_name": files / "dropout",
            "actor__loss__import_path": f"{files / 'mortal.py'}:mortal",
        }
    return COMMON | {
        "rollout__env_path": files / "mortal.py", "test_data__path": files / "rows.jsonl",
        "rollout__env_workers": 0,  # it shall take the trainer along
        "trainer__test_freq": 3, "test_data__max_examples": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Uninterrupted runs by trainer: (folder, rows), with a checkpoint after every second step."""
    runs = {}

    def run(trainer):
        if trainer not in runs:
            folder = tmp_path_factory.mktemp(trainer)
            rows = train(files, trainer, folder, **settings(files, trainer), trainer__save_freq=2)
            runs[trainer] = folder, rows
        return runs[trainer]

    return run


@pytest.fixture(autouse=True)
def lines_of_the_library(caplog):
    caplog.set_level(logging.INFO, logger="RL2")


@pytest.fixture
def die(files):
    """Call with `how when`; the order is withdrawn after the test."""
    order = files / "die"
    yield lambda what: order.write_text(what) if what else order.unlink()
    order.unlink(missing_ok=True)


def assert_same_run(folder, whole):
    expected_folder, expected = whole
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert lasting(row) == lasting(other)
    assert same_weights(weights(folder / "final"), weights(expected_folder / "final"))


def copy(whole, tmp_path, last):
    """The folder of a whole run as it was after step `last`."""
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    for path in (folder / "checkpoints").glob("step*"):
        if path.name > f"step{last:06d}":
            shutil.rmtree(path)
    return folder


# ------------------------------------------------------------------------------ equal bit for bit


def test_the_runs_compared_here_depend_on_what_is_restored(whole):
    """Otherwise equal rows would mean nothing."""
    _, rows = whole("sft")
    assert len({row["actor/lr"] for row in rows}) == len(rows)
    assert len({row["actor/loss"] for row in rows}) == len(rows)
    _, rows = whole("spo")
    assert sum("actor/loss" in row for row in rows) >= 4


def test_spo_killed_and_resumed(files, whole, die, tmp_path):
    lines = overrides(
        files, "spo", tmp_path / "run", **settings(files, "spo"), trainer__save_freq=2
    )
    # 4 evaluations at step 0 and after step 3, 8 samples a step: amid the sixth step's rollout
    die("kill 53")
    killed = command("spo", lines)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "run"
    assert [row["step"] for row in rows_of(run)] == [0, 1, 2, 3, 4, 5]
    assert not (run / "final").exists()
    die("")
    resumed = command("spo", [*lines, "trainer.load_ckpt_from=latest"])
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr and "step000004" in resumed.stderr
    assert_same_run(run, whole("spo"))


@pytest.mark.parametrize("named", [False, True], ids=["latest", "path"])
def test_sft_broken_off_and_resumed(files, whole, die, tmp_path, named):
    die("raise 6")
    changes = settings(files, "sft") | {"trainer__save_freq": 2}
    with pytest.raises(TrainingError, match="went away"):
        train(files, "sft", tmp_path, **changes)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    die("")
    which = tmp_path / "checkpoints/step000002" if named else "latest"
    train(files, "sft", tmp_path, **changes, trainer__load_ckpt_from=which)
    assert_same_run(tmp_path, whole("sft"))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_from_every_checkpoint(files, whole, tmp_path, step):
    """Also across the end of an epoch: step 6 is its last."""
    folder = copy(whole("spo"), tmp_path, step)
    train(files, "spo", folder, **settings(files, "spo"), trainer__load_ckpt_from="latest")
    assert_same_run(folder, whole("spo"))


def test_a_finished_run_resumed_does_nothing(files, whole, tmp_path):
    folder = copy(whole("sft"), tmp_path, 7)
    train(files, "sft", folder, **settings(files, "sft"), trainer__load_ckpt_from="latest")
    assert_same_run(folder, whole("sft"))
    assert (folder / "checkpoints/latest").read_text() == "step000007"


def test_moments_and_rng_are_in_the_checkpoint(whole):
    folder = whole("sft")[0] / "checkpoints/step000006"
    keys = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        assert any(key.startswith("actor.optimizer.state") and key.endswith(moment) for key in keys)
    mine = torch.load(folder / "rank0.pt", weights_only=True)
    assert mine["rng"]["cpu"].dtype == torch.uint8
    # steps of epochs of three rows: after the sixth the third epoch begins
    assert json.loads((folder / "trainer.json").read_text())["step"] == 6


# ------------------------------------------------------------------------------ what does not load


def test_latest_without_a_checkpoint_starts_anew_and_says_so(files, tmp_path, caplog):
    changes = {"trainer__max_steps": 1, "trainer__load_ckpt_from": "latest"}
    assert [row["step"] for row in train(files, "sft", tmp_path, **changes)] == [1]
    assert sum("starting anew" in line for line in caplog.messages) == 1


DAMAGE = {
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
    "half a tensor file": lambda folder: os.truncate(next(folder.glob("*.distcp")), 1000),
    "empty rank file": lambda folder: (folder / "rank0.pt").write_bytes(b""),
    "rank file of noise": lambda folder: (folder / "rank0.pt").write_bytes(b"noise" * 99),
    "half a state": lambda folder: (folder / "trainer.json").write_text('{"step": 6,'),
    "another state": lambda folder: (folder / "trainer.json").write_text("null"),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_latest_is_named_and_the_one_before_is_used(
    files, whole, tmp_path, caplog, damage
):
    folder = copy(whole("sft"), tmp_path, 6)
    DAMAGE[damage](folder / "checkpoints/step000006")
    train(files, "sft", folder, **settings(files, "sft"), trainer__load_ckpt_from="latest")
    named = [line for line in caplog.messages if "does not load" in line]
    assert len(named) == 1 and "step000006" in named[0] and "\n" not in named[0]
    assert any("resumed from" in line and "step000004" in line for line in caplog.messages)
    assert_same_run(folder, whole("sft"))


def test_a_named_damaged_checkpoint_is_an_error(files, whole, tmp_path):
    folder = copy(whole("sft"), tmp_path, 6)
    which = folder / "checkpoints/step000006"
    (which / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="step000006 does not load .*latest") as caught:
        train(files, "sft", folder, **settings(files, "sft"), trainer__load_ckpt_from=which)
    assert "\n" not in str(caught.value)


def test_a_damaged_one_that_cannot_be_renamed_is_an_error(files, whole, tmp_path, monkeypatch):
    folder = copy(whole("sft"), tmp_path, 6)
    (folder / "checkpoints/step000006/.metadata").unlink()
    rename = os.rename

    def read_only(source, target, **kwargs):
        if "damaged-" in str(target):
            raise PermissionError(13, "Permission denied")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", read_only)
    message = "step000006 is damaged and cannot be renamed to damaged-step000006 .*denied"
    with pytest.raises(CheckpointError, match=message):
        train(files, "sft", folder, **settings(files, "sft"), trainer__load_ckpt_from="latest")


def test_no_checkpoint_that_loads_is_an_error(files, whole, tmp_path):
    folder = copy(whole("sft"), tmp_path, 2)
    (folder / "checkpoints/step000002/.metadata").unlink()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints"):
        train(files, "sft", folder, **settings(files, "sft"), trainer__load_ckpt_from="latest")


def test_other_data_than_the_checkpoints_is_an_error(files, whole, tmp_path):
    folder = copy(whole("sft"), tmp_path, 6)
    changes = settings(files, "sft") | {"data__path": write_rows(tmp_path / "more.jsonl", 40)}
    with pytest.raises(DataError, match="has 40 rows.*24"):
        train(files, "sft", folder, **changes, trainer__load_ckpt_from="latest")


@pytest.mark.parametrize("trainer", ["sft", "spo"])
def test_rows_that_were_edited_are_other_data(files, whole, tmp_path, trainer):
    """The same rows under another name are not; a folder that was refused is as it was."""
    folder = copy(whole(trainer), tmp_path, 2)
    steps = sorted(folder.glob("checkpoints/*"))
    changes = settings(files, trainer) | {"trainer__load_ckpt_from": "latest"}
    key = "data__path" if trainer == "sft" else "train_data__path"
    first, *others = (files / "rows.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join([*others, first]))
    with pytest.raises(DataError, match=r"has 24 rows, but not those that the checkpoint was"):
        train(files, trainer, folder, **changes | {key: path})
    assert sorted(folder.glob("checkpoints/*")) == steps
    path.write_text("".join([first, *others]))
    train(files, trainer, folder, **changes | {key: path})
    assert_same_run(folder, whole(trainer))


# ------------------------------------------------------------------------------ beside the training


def test_a_save_beside_the_training_is_of_its_step_and_appears_when_it_is_durable(
    files, whole, tmp_path, monkeypatch
):
    """The weights change twice while they are written."""
    folder, save, seen = tmp_path / "run", dcp.save, []

    def n_logged():  # a last line may be half written
        return (folder / "metrics.jsonl").read_text().count("\n")

    def slow_save(tensors, **options):
        end = time.monotonic() + 60
        while n_logged() < 6 and not seen and time.monotonic() < end:
            time.sleep(0.01)
        seen.append((n_logged(), Checkpoints(folder).steps()))
        save(tensors, **options)

    monkeypatch.setattr(dcp, "save", slow_save)
    rows = train(files, "sft", folder, **settings(files, "sft"), trainer__save_freq=4,
                 trainer__async_save="true")  # fmt: skip
    # This thread may have been held up until the last step, which waits for it.
    assert seen[0] in ((6, []), (7, []))
    assert [lasting(row) for row in rows] == [lasting(row) for row in whole("sft")[1]]
    for step in ("step000004", "step000007"):
        one, other = (run / "checkpoints" / step for run in (folder, whole("sft")[0]))
        assert same_weights(checkpoint_weights(one), checkpoint_weights(other))
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]


def test_a_save_beside_the_training_that_fails_stops_the_run(files, tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(dcp, "save", no_room)
    changes = settings(files, "sft") | {"trainer__n_epochs": 400, "trainer__max_steps": 1000}
    with pytest.raises(CheckpointError, match="step000002 cannot be written .No space left"):
        train(files, "sft", tmp_path, **changes, trainer__save_freq=2, trainer__async_save="true")
    assert len(rows_of(tmp_path)) < 1000
    assert not list((tmp_path / "checkpoints").glob("*step*"))


# ------------------------------------------------------------------------------ the folder


def test_half_written_folders_and_lines_do_not_count(files, whole, tmp_path):
    folder = copy(whole("sft"), tmp_path, 4)
    (folder / "checkpoints/.writing-step000006").mkdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "actor/lo')
    assert [p.name for p in Checkpoints(folder).steps()] == ["step000004", "step000002"]
    train(files, "sft", folder, **settings(files, "sft"), trainer__load_ckpt_from="latest",
          trainer__save_freq=6)  # fmt: skip
    assert_same_run(folder, whole("sft"))
    assert not (folder / "checkpoints/.writing-step000006").exists()


def test_keep_last(files, tmp_path):
    train(files, "sft", tmp_path, trainer__save_freq=1, trainer__keep_last=2)
    assert [p.name for p in Checkpoints(tmp_path).steps()] == ["step000003", "step000002"]


def test_a_new_run_moves_an_old_one_aside(files, whole, tmp_path, caplog):
    """Its checkpoints would otherwise be newer than the new run's."""
    folder = copy(whole("sft"), tmp_path, 7)
    train(files, "sft", folder, trainer__max_steps=1, trainer__save_freq=1)
    assert [p.name for p in Checkpoints(folder).steps()] == ["step000001"]
    assert [row["step"] for row in rows_of(folder)] == [1]
    assert_same_run(folder / "before1", whole("sft"))
    assert len(Checkpoints(folder / "before1").steps()) == 4
    assert sum("before1" in line for line in caplog.messages) == 1


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones(files, whole, tmp_path):
    folder = copy(whole("sft"), tmp_path, 7)
    changes = settings(files, "sft") | {"actor__loss__options__power": 2.0}
    start = folder / "checkpoints/step000002"
    train(files, "sft", folder, **changes, trainer__load_ckpt_from=start)
    steps = [path.name for path in Checkpoints(folder).steps()]
    assert steps == ["step000007", "step000002"]
    final = weights(folder / "final")
    assert same_weights(final, checkpoint_weights(folder / "checkpoints/step000007"))
    assert not same_weights(final, weights(whole("sft")[0] / "final"))
    aside = [path.name for path in Checkpoints(folder / "before1").steps()]
    assert aside == ["step000007", "step000006", "step000004"]


@pytest.mark.parametrize("best", [4, 2, None])
def test_going_back_keeps_what_came_of_the_later_steps(files, whole, tmp_path, best):
    """best: the step of the best evaluation that the newest checkpoint knows."""
    folder = copy(whole("spo"), tmp_path, 7)
    expected = [lasting(row) for row in rows_of(folder)]
    newest = folder / "checkpoints/step000007/trainer.json"
    state = json.loads(newest.read_text())
    state["best"] = {} if best is None else {"step": best, "test/score": 0.5}
    newest.write_text(json.dumps(state))
    answers = {path.name: path.read_text() for path in (folder / "rollouts").iterdir()}
    Checkpoints(str(folder)).set_aside(2)
    aside = folder / "before1"
    assert [path.name for path in Checkpoints(str(folder)).steps()] == ["step000002"]
    assert (
        [lasting(row) for row in rows_of(aside)]
        == expected
        == [lasting(row) for row in rows_of(folder)]
    )  # which the metrics cut
    kept = {path.name: path.read_text() for path in (aside / "rollouts").iterdir()}
    assert kept == {name: text for name, text in answers.items() if name > "step000003"}
    assert same_weights(weights(aside / "final"), weights(whole("spo")[0] / "final"))
    assert not (folder / "final").exists()
    assert (aside / "best").exists() is not (folder / "best").exists()
    assert (aside / "best").exists() is (best == 4)
    Checkpoints(str(folder)).set_aside(2)
    assert not (folder / "before2").exists()


def test_going_back_and_on_with_rollouts(files, whole, tmp_path):
    folder = copy(whole("spo"), tmp_path, 7)
    start = folder / "checkpoints/step000004"
    train(files, "spo", folder, **settings(files, "spo"), trainer__load_ckpt_from=start)
    assert_same_run(folder, whole("spo"))
    for name in ("best", "final"):
        assert same_weights(weights(folder / name), weights(whole("spo")[0] / name))


def test_latest_names_the_newest_also_after_a_kill(files, whole, tmp_path):
    """Just before it was to be renamed, or with later checkpoints in its way."""
    folder = copy(whole("sft"), tmp_path, 4)
    (folder / "checkpoints/.latest").write_text("step000004")
    (folder / "checkpoints/latest").write_text("step000002")
    changes = settings(files, "sft") | {
        "trainer__max_steps": 4,
        "trainer__load_ckpt_from": "latest",
    }
    train(files, "sft", folder, **changes)
    assert (folder / "checkpoints/latest").read_text() == "step000004"
    assert not (folder / "checkpoints/.latest").exists()
