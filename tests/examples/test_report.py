"""The examples' report, on run folders whose numbers are known."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "examples" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(run: Path, tests: dict[int, list[float]], updated: bool = True) -> Path:
    """A run of 4 steps. tests: scores of the test problems by step of the evaluation."""
    (run / "rollouts").mkdir(parents=True)
    rows = []
    for step in range(5):
        row: dict[str, float] = {"step": step}
        if step > 0:
            row["train/avg_response_length"] = 20.0 + step
            row["actor/skipped"] = 0.0 if updated else 1.0
            if updated:
                row |= {"actor/entropy": 0.5 - step / 10, "actor/loss": 1.0 / step}
        if step in tests:
            row["test/score"] = sum(tests[step]) / len(tests[step])
            row["test/sampled_score"] = 0.25 + step / 100
            dump = run / "rollouts" / f"step{step:06d}_test.jsonl"
            dump.write_text("".join(json.dumps({"score": s}) + "\n" for s in tests[step]))
        rows.append(row)
    if len(rows[0]) == 1:
        del rows[0]  # step 0 is logged only where something was evaluated
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def run_report(report, monkeypatch, capsys, tmp_path):
    """Call the script's main; gives its lines and checks the picture."""

    def call(*runs: Path) -> list[str]:
        png = tmp_path / "curves.png"
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, runs), "--png", str(png)])
        report.main()
        assert png.read_bytes().startswith(PNG_MAGIC) and png.stat().st_size > 10_000
        lines = capsys.readouterr().out.splitlines()
        assert f"picture:     {png}" in lines
        return lines

    return call


def test_table_gives_start_best_and_last_with_paired_errors(run_report, tmp_path):
    # One of four becomes right, then another one wrong as well.
    tests = {0: [1, 1, 0, 0], 2: [1, 1, 1, 0], 4: [0, 1, 1, 0]}
    lines = run_report(make_run(tmp_path / "spo", tests))
    header, row = lines[:2]
    assert header.split()[:3] == ["run", "test", "before"]
    assert row.split()[:2] == ["spo", "0.500"]
    # differences 0, 0, 1, 0: variance 1/4 over 4 problems
    assert "0.750 (+0.250 ± 0.250) at step 2" in row
    assert "0.500 (+0.000 ± 0.408)" in row  # differences -1, 0, 1, 0: variance 2/3 over 4 problems
    assert "0.400 → 0.100" in row and "21.0 → 24.0" in row
    # Columns stand below their names.
    cells = {"best": "0.750", "last": "0.500 (+", "sampled": "0.250 → 0.290", "entropy": "0.400"}
    for name, cell in cells.items():
        assert row[header.index(name) :].startswith(cell)


def test_several_runs_share_table_and_picture(run_report, report, tmp_path):
    runs = [make_run(tmp_path / name, {0: [0, 1], 4: [1, 1]}) for name in ("ppo", "spo")]
    (runs[1] / "best").mkdir()
    lines = run_report(*runs)
    assert [line.split()[0] for line in lines[1:3]] == ["ppo", "spo"]
    assert f"model:       {runs[0] / 'final'}" in lines
    assert f"model:       {runs[1] / 'final'} (best evaluation: {runs[1] / 'best'})" in lines
    for kind in ("checkpoints", "rollouts"):
        assert sum(line.startswith(f"{kind}:") for line in lines) == 2


def test_one_evaluation_is_start_best_and_last(run_report, tmp_path):
    row = run_report(make_run(tmp_path / "run", {0: [0, 1, 1, 1]}))[1]
    assert row.count("0.750 (+0.000 ± 0.000)") == 2


def test_one_test_problem_has_no_standard_error_but_a_table(run_report, tmp_path):
    assert "1.000" in run_report(make_run(tmp_path / "run", {0: [0], 4: [1]}))[1]


def test_run_without_evaluation(run_report, tmp_path):
    row = run_report(make_run(tmp_path / "run", {}))[1]
    assert row.startswith("run") and "0.400 → 0.100" in row


def test_run_that_skipped_every_step(run_report, tmp_path):
    row = run_report(make_run(tmp_path / "run", {0: [0, 0], 4: [0, 0]}, updated=False))[1]
    assert row.startswith("run") and "21.0 → 24.0" in row


def test_run_without_dumps(run_report, tmp_path):
    run = make_run(tmp_path / "run", {0: [0, 1], 4: [1, 1]})
    for dump in (run / "rollouts").iterdir():
        dump.unlink()
    assert "1.000" in run_report(run)[1]
