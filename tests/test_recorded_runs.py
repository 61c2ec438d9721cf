"""The record of runs names what changed, and only that."""

import copy

import pytest

from RL2.config import validate
from tests.recorded_runs import RUNS, differences
from tests.trainer.support import composed, overrides, write_files

RECORD = {
    "spo": {
        "metrics": [{"step": 1, "actor/loss": 0.1}, {"step": 2, "actor/loss": 0.2}],
        "files": {"final/model.safetensors": "ab"},
    }
}


def test_equal_records_have_no_differences():
    assert differences(RECORD, copy.deepcopy(RECORD)) == []


def test_a_last_digit_a_file_a_row_and_a_run():
    other = copy.deepcopy(RECORD)
    other["spo"]["metrics"][1]["actor/loss"] = 0.2 + 2**-54
    assert differences(RECORD, other) == ["spo: step 2 actor/loss 0.2, then 0.20000000000000007"]
    other = copy.deepcopy(RECORD)
    other["spo"]["files"]["final/model.safetensors"] = "cd"
    assert differences(RECORD, other) == ["spo: final/model.safetensors is not the same"]
    other = copy.deepcopy(RECORD)
    del other["spo"]["metrics"][1]
    assert differences(RECORD, other) == ["spo: 2 rows, then 1"]
    assert differences(RECORD, {}) == ["spo: only in one of the two"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_valid_config(files, tmp_path, name):
    trainer, n_ranks, changes = RUNS[name]
    changes = {
        key: files / "env.py" if value == "turns.py" else files / value
        if isinstance(value, str) and value.endswith(".jsonl") else value
        for key, value in changes.items()
    }  # fmt: skip
    validate(composed(trainer, overrides(files, trainer, tmp_path, **changes)), n_ranks)
