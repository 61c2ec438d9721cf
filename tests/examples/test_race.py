"""The table of a race, from metrics written by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, tokens: list[int], greedy: list[float], sampled: list[float]) -> None:
    """A run evaluated at every step; a step generates `tokens`."""
    folder.mkdir(parents=True)
    rows = []
    for step, (before, after) in enumerate(zip(greedy, sampled, strict=True)):
        row = {"step": step, "test/score": before, "test/sampled_score": after}
        if step:
            row |= {
                "rollout/tokens": tokens[step - 1], "actor/entropy": 1.0 / step,
                "train/score": 0.1 * step,
                "train/avg_response_length": 10.0 * step, "actor/skipped": 0.0,
            }  # fmt: skip
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def race(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "race.py"), str(folder)]
    return subprocess.run(
        [*command, "--out", str(folder / "table.md")], cwd=ROOT, capture_output=True, text=True
    )


def test_all_runs_are_compared_at_the_tokens_of_the_shortest(tmp_path):
    # 3k tokens are the budget: the wordy runs count up to step 1 only.
    write_run(tmp_path / "0" / "terse", [1000] * 3, [0.5, 0.5, 0.5, 0.7], [0.4, 0.4, 0.4, 0.6])
    write_run(tmp_path / "1" / "terse", [1000] * 3, [0.5, 0.5, 0.5, 0.9], [0.4, 0.4, 0.4, 0.8])
    for seed in ("0", "1"):
        write_run(tmp_path / seed / "wordy", [2500, 2500], [0.5, 0.6, 1.0], [0.4, 0.45, 1.0])
    result = race(tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "table.md").read_text() == result.stdout
    assert result.stdout.splitlines()[0] == "Budget: 3k generated tokens a run; seeds: 2."
    terse, wordy = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in result.stdout.splitlines()[4:]
    )
    # gains of 0.2 and 0.4: mean 0.3, standard error 0.1, t = 12.706
    assert terse == [
        "terse", "0.200 (+0.000 ± 0.000)", "0.700 (+0.300 ± 1.271)", "0.800 (+0.300 ± 1.271)",
        "1.000 → 0.333", "10.0 → 30.0", "3k", "0.0",
    ]  # fmt: skip
    assert wordy == [
        "wordy", "0.100 (+0.000 ± 0.000)", "0.450 (+0.050 ± 0.000)", "0.600 (+0.100 ± 0.000)",
        "1.000 → 1.000", "10.0 → 10.0", "2k", "0.0",
    ]  # fmt: skip


def test_one_seed_has_no_interval(tmp_path):
    write_run(tmp_path / "0" / "terse", [1000], [0.5, 0.7], [0.4, 0.6])
    assert "| 0.600 (+0.200) | 0.700 (+0.200) |" in race(tmp_path).stdout


def test_a_folder_without_runs_is_one_line(tmp_path):
    result = race(tmp_path)
    assert result.returncode == 1
    assert result.stderr == (f"race: {tmp_path}: no runs with rollouts in <seed>/<algorithm>\n")


@pytest.mark.parametrize("n", range(2, 10))
def test_the_points_of_students_t(monkeypatch, n):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from race import STUDENT

    df, width = n - 1, STUDENT[n] / 20_000
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    middles = ((i + 0.5) * width for i in range(20_000))
    above_the_mean = math.fsum((1 + t * t / df) ** (-(df + 1) / 2) for t in middles) * width * scale
    assert above_the_mean == pytest.approx(0.475, abs=2e-5)
