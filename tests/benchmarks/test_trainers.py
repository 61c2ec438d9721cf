"""The benchmark of trainers against TRL: what both sides are given, and what is printed."""

import argparse
import json

import pytest

from benchmarks import trainers
from RL2.config import validate
from tests.trainer.support import composed


def options(**changes) -> argparse.Namespace:
    tiny = {"vocab": 64, "hidden": 64, "layers": 1, "batch": 3}
    return argparse.Namespace(**vars(trainers.parser().parse_args([])) | tiny | changes)


@pytest.mark.parametrize("method", trainers.METHODS)
def test_our_side_is_a_run_on_all_rows(tmp_path, method):
    sizes = options()
    trainers.write_files(tmp_path, sizes)
    lines = trainers.our_lines(tmp_path, sizes, method, 2048)
    config = composed(method, lines)
    validate(config, 1)
    rows = (tmp_path / trainers.rows_file(method)).read_text().splitlines()
    assert len(rows) == config.data.batch_size == 3
    low, high = sizes.response_length
    for row in map(json.loads, rows):
        answers = [row[key] for key in row.keys() - {"prompt"}]
        assert len(answers) == (1 if method == "sft" else 2)
        assert all(low <= len(answer.split()) <= high for answer in answers)


def test_the_fastest_of_each_side_are_compared_by_cpu_time(capsys):
    def steps(*cpu: float) -> list[dict]:
        return [{"cpu": one, "seconds": 9.0, "peak_gib": 0.5} for one in cpu]

    found = {
        "RL2, a": steps(2, 2, 2), "RL2, b": steps(1, 1, 2), "TRL, 4 rows": steps(3, 4, 4),
        "TRL, 2 rows": steps(5, 5, 5), "TRL, 4 rows, ref once": steps(2, 2, 2),
    }  # fmt: skip
    trainers.print_table(found, "dpo", 8)
    said = capsys.readouterr().out
    assert "| RL2, b | 1.000 (1.000–2.000) | 9.000 | 8.0 | 0.50 |" in said
    assert "RL2, b: 3.00 times the samples of TRL, 4 rows (2.00–4.00 in single rounds)" in said
    assert "RL2, b: 2.00 times the samples of TRL, 4 rows, ref once (1.00–2.00" in said
