"""The examples' report, on run folders whose numbers are known."""

import importlib.util
import json
import os
import subprocess
import sys
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
            row["train/reward"] = step / 10
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
    assert "1.0000 → 0.2500" in row  # loss
    assert row[header.index("reward") :].startswith("0.100 → 0.400")
    # Columns stand below their names.
    cells = {"best": "0.750", "last": "0.500 (+", "sampled": "0.250 → 0.290", "entropy": "0.400"}
    for name, cell in cells.items():
        assert row[header.index(name) :].startswith(cell)


def test_several_runs_share_table_and_picture(run_report, report, tmp_path):
    runs = [make_run(tmp_path / name, {0: [0, 1], 4: [1, 1]}) for name in ("ppo", "spo")]
    for folder in (runs[0] / "final", runs[1] / "final", runs[1] / "best"):
        folder.mkdir()
    lines = run_report(*runs)
    assert [line.split()[0] for line in lines[1:3]] == ["ppo", "spo"]
    assert f"model:       {runs[0] / 'final'}" in lines
    assert f"best model:  {runs[1] / 'best'}" in lines and f"{runs[0] / 'best'}" not in str(lines)
    assert sum(line.startswith("rollouts:") for line in lines) == 2
    # Nothing was saved on the way.
    assert not any(line.startswith("checkpoints:") for line in lines)


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


def test_supervised_run(run_report, tmp_path):
    run = tmp_path / "sft"
    run.mkdir()
    rows = [{"step": step, "actor/loss": 2.0 / step, "actor/entropy": 1.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = run_report(run)
    assert lines[0].split() == ["run", "loss", "entropy"]
    assert "2.0000 → 1.0000" in lines[1]
    # Only what is there.
    assert lines[2:] == [lines[2], f"metrics:     {run / 'metrics.jsonl'}"]


def test_labels_tell_runs_apart(report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a/spo/seed0", "b/spo/seed0", "a/spo/seed1"]
    assert report.labels([Path(name) for name in names]) == names
    assert report.labels([Path("a/spo"), Path("a/ppo")]) == ["spo", "ppo"]
    assert report.labels([Path("a/spo"), Path("a/spo/")]) == ["spo", "spo"]  # the same run twice
    assert report.labels([Path(".")]) == [tmp_path.name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no folder of a run"),
        ("", "empty; the run has not finished a step yet"),
        ("{1\n", "a line that is not JSON"),
        ('{"step": 1, "train/rew', "empty; the run has not finished a step yet"),
    ],
)
def test_a_wrong_folder_is_one_line(report, monkeypatch, tmp_path, text, message):
    run = tmp_path / "run"
    run.mkdir()
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["report.py", str(run), "--png", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit) as end:
        report.main()
    line = str(end.value)
    assert line.startswith("report: ") and str(run) in line and message in line
    assert "\n" not in line and not (tmp_path / "a.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_nobody_reads_the_table(tmp_path):
    png = tmp_path / "curves.png"
    words = [sys.executable, str(ROOT / "examples/report.py"), str(make_run(tmp_path / "run", {}))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*words, "--png", str(png)], stdout=full, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    assert done.returncode == 0 and png.exists()


def test_half_a_line_is_left_out(run_report, tmp_path):
    run = make_run(tmp_path / "run", {0: [0, 1], 4: [1, 1]})
    expected = run_report(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "test/sco')
    assert run_report(run) == expected


@pytest.mark.parametrize("png", ["curves.nonsense", "run/metrics.jsonl/curves.png"])
def test_a_picture_that_cannot_be_is_one_line(report, monkeypatch, tmp_path, png):
    run = make_run(tmp_path / "run", {0: [0, 1], 4: [1, 1]})
    monkeypatch.setattr("sys.argv", ["report.py", str(run), "--png", str(tmp_path / png)])
    with pytest.raises(SystemExit) as end:
        report.main()
    line = str(end.value)
    assert line.startswith(f"report: --png {tmp_path / png}: cannot be written (")
    assert "\n" not in line


def test_a_terminal_acts_on_no_name_of_a_folder(run_report, report, monkeypatch, tmp_path):
    run = make_run(tmp_path / "a\x1b]0;x\x07\u202eb", {0: [0, 1], 4: [1, 1]})
    assert not {"\x1b", "\x07", "\u202e"} & set("".join(run_report(run)))
    monkeypatch.setattr("sys.argv", ["report.py", f"{run}-none", "--png", "a.png"])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert r"a\x1b]0;x\x07\u202eb-none" in str(end.value)
