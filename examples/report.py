"""What became of one or several runs: a table on the terminal and a picture.

    python examples/report.py runs/quickstart/spo [runs/quickstart/ppo …] --png curves.png

Reads each run's `metrics.jsonl` and its dumps of the test set. A gain is given with its standard
error over the test problems, both evaluations being paired problem by problem.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "test/score": "Test score (greedy)",
    "actor/entropy": "Entropy of the policy (nats per token)",
    "actor/loss": "Loss",
    "train/avg_response_length": "Response length (tokens)",
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def series(rows: list[dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def test_scores(run: Path, step: int) -> list[float]:
    """Scores of the test problems; none where the run did not dump its rollouts."""
    dump = run / "rollouts" / f"step{step:06d}_test.jsonl"
    lines = dump.read_text().splitlines() if dump.exists() else []
    return [json.loads(line)["score"] for line in lines]


def paired_error(before: list[float], after: list[float]) -> float:
    """Standard error of the mean difference; NaN where two problems do not carry one."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if len(differences) < 2:
        return math.nan
    return statistics.stdev(differences) / math.sqrt(len(differences))


def change(values: list[float], digits: int) -> str:
    """First and last value; a dash where there is none (no evaluation, every step skipped)."""
    return f"{values[0]:.{digits}f} → {values[-1]:.{digits}f}" if values else "–"


def summary(run: Path) -> dict[str, str]:
    rows = read_metrics(run)
    steps, scores = series(rows, "test/score")

    def gain(index: int) -> str:
        error = paired_error(test_scores(run, steps[0]), test_scores(run, steps[index]))
        return f"{scores[index]:.3f} ({scores[index] - scores[0]:+.3f} ± {error:.3f})"

    best = max(range(len(scores)), key=scores.__getitem__, default=None)
    return {
        "run": run.name,
        "test before": f"{scores[0]:.3f}" if scores else "–",
        "best": f"{gain(best)} at step {steps[best]}" if scores else "–",
        "last": gain(-1) if scores else "–",
        "sampled": change(series(rows, "test/sampled_score")[1], 3),
        "entropy": change(series(rows, "actor/entropy")[1], 3),
        "length": change(series(rows, "train/avg_response_length")[1], 1),
    }


def table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def draw(runs: list[Path], png: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    if len(runs) > 1:
        # losses of different kinds differ by orders of magnitude, and some are negative
        axes[1, 0].set_yscale("symlog", linthresh=1e-5)
    for color, run in zip(plt.cm.tab10.colors, runs, strict=False):
        rows = read_metrics(run)
        for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
            steps, values = series(rows, name)
            marker = "o" if name == "test/score" else None
            axis.plot(steps, values, color=color, marker=marker, markersize=4, label=run.name)
            axis.set_title(title, fontsize=11)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            n = len(test_scores(run, steps[0])) if name == "test/score" and steps else 0
            if n:
                errors = [math.sqrt(value * (1 - value) / n) for value in values]
                low = [value - error for value, error in zip(values, errors, strict=True)]
                high = [value + error for value, error in zip(values, errors, strict=True)]
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    low, high = axes[1, 1].get_ylim()
    if high - low < 2:  # a hundredth of a token must not look like a change
        axes[1, 1].set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
    for axis in axes[1]:
        axis.set_xlabel("Step")
    if len(runs) > 1:
        axes[0, 0].legend(frameon=False)
    figure.suptitle(
        f"{', '.join(run.name for run in runs)}: band = one binomial standard error", fontsize=10
    )
    figure.savefig(png, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--png", type=Path, required=True)
    args = parser.parse_args()
    print(table([summary(run) for run in args.runs]))
    draw(args.runs, args.png)
    print(f"picture:     {args.png}")
    for run in args.runs:
        best = run / "best"
        print(
            f"model:       {run / 'final'}{f' (best evaluation: {best})' if best.exists() else ''}"
        )
        print(f"checkpoints: {run / 'checkpoints'}")
        print(f"metrics:     {run / 'metrics.jsonl'}")
        print(f"rollouts:    {run / 'rollouts'}")


if __name__ == "__main__":
    main()
