"""A run that goes on with another number of processes is the same run."""

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.faults.support import LONG, Run
from tests.trainer.support import checkpoint_weights, rows_of, same_weights, write_files

# Three epochs of three steps; parts of three steps each.
SETTINGS = {
    "trainer__n_epochs": 3, "trainer__save_freq": 3, "actor__scheduler": "constant",
    "actor__warmup_ratio": 0.0, "actor__lr": "1e-3",
}  # fmt: skip
SIZES = [(1, 2, 1), (2, 4, 2), (2, 1, 2), (4, 1, 3), (1, 4, 2)]
ALL = [(sizes, staleness) for sizes in SIZES for staleness in (0, 1)]
SOME = [(SIZES[0], 0), (SIZES[1], 1)]
EXACT = ("train/score", "train/n_samples", "train/avg_response_length", "rollout/staleness")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def optimizer(checkpoint, folder):
    """Moments and steps by parameter, whatever ranks have written them."""
    path = folder / f"{checkpoint.parent.parent.name}-{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, path)
    return torch.load(path, weights_only=True)["actor"]["optimizer"]["state"]


def dumped(folder, step):
    return (folder / f"rollouts/step{step:06d}_train.jsonl").read_text()


@pytest.mark.parametrize(("sizes", "staleness"), ALL if LONG else SOME, ids=str)
def test_a_run_over_changing_numbers_of_processes(files, tmp_path, sizes, staleness):
    settings = SETTINGS | {"rollout__staleness": staleness}
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    Run(files, "spo", whole, sizes[0], **settings).finish()
    for number, n_ranks in enumerate(sizes):
        resume = {"trainer__load_ckpt_from": "latest"} if number else {}
        run = Run(files, "spo", changed, n_ranks, **settings, **resume)
        if number < 2:  # ends as soon as its part is saved
            run.kill_at(changed / f"checkpoints/step{3 * (number + 1):06d}")
        else:
            run.finish()
    rows, others = rows_of(whole), rows_of(changed)
    assert [row["step"] for row in others] == list(range(1, 10))
    for step, (row, other) in enumerate(zip(rows, others, strict=True), start=1):
        assert dumped(changed, step) == dumped(whole, step)
        assert {name: row.get(name) for name in EXACT} == {name: other.get(name) for name in EXACT}
        assert other["actor/loss"] == pytest.approx(row["actor/loss"], rel=0, abs=1e-6)
    for step in (3, 6, 9):
        one, other = (folder / f"checkpoints/step{step:06d}" for folder in (whole, changed))
        expected, found = optimizer(one, tmp_path), optimizer(other, tmp_path)
        assert expected.keys() == found.keys() and len(found) > 10
        for name, state in expected.items():
            assert state["step"] == found[name]["step"] == step
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(found[name][moment], state[moment], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_what_another_number_of_processes_loads_is_what_was_saved(files, tmp_path, before, after):
    """Bit for bit: a run that goes on without an update saves the same again."""
    folder, settings = tmp_path / "run", {"trainer__max_steps": 3, **SETTINGS}
    Run(files, "spo", folder, before, **settings).finish()
    settings |= {"trainer__max_steps": 4, "actor__freeze_steps": 9}
    Run(files, "spo", folder, after, trainer__load_ckpt_from="latest", **settings).finish()
    one, other = (folder / f"checkpoints/step{step:06d}" for step in (3, 4))
    assert same_weights(checkpoint_weights(one), checkpoint_weights(other))
    expected, found = optimizer(one, tmp_path), optimizer(other, tmp_path)
    assert expected.keys() == found.keys() and len(found) > 10
    for name, state in expected.items():
        assert all(torch.equal(value, found[name][key]) for key, value in state.items())
