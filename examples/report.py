"""The results of one or several runs: a table on the terminal and a picture.

    python examples/report.py runs/quickstart/spo [runs/quickstart/ppo …] --png curves.png

Also works for supervised runs. Reads each run's `metrics.jsonl` and its dumps of the test set. A
gain is given with its standard error over the test problems; the two evaluations are paired by
problem.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"]
SCORE, ENTROPY, LOSS = "test/score", "actor/entropy", "actor/loss"
REWARD, LENGTH = "train/reward", "train/avg_response_length"
TITLES = {
    SCORE: "Test score (greedy)",
    REWARD: "Training reward",
    LOSS: "Loss",
    ENTROPY: "Entropy of the policy (nats per token)",
    LENGTH: "Response length (tokens)",
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Rows of a run; ends with one line if the folder is not a run's."""
    path = run / "metrics.jsonl"
    try:
        # The last line may be incomplete: a step that is being written, or a killed run.
        lines = path.read_text().rpartition("\n")[0].splitlines()
        rows = [json.loads(line) for line in lines]
    except OSError as error:
        sys.exit(readable(f"report: {run}: no folder of a run ({path}: {error.strerror})"))
    except ValueError as error:
        sys.exit(readable(f"report: {path}: a line that is not JSON ({error})"))
    if not rows:
        sys.exit(readable(f"report: {path}: empty; the run has not finished a step yet"))
    return rows


def labels(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish the runs."""
    parts = [run.resolve().parts for run in runs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def series(rows: list[dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def test_scores(run: Path, step: int) -> list[float]:
    """Scores of the test problems; none if the run did not dump its rollouts."""
    dump = run / "rollouts" / f"step{step:06d}_test.jsonl"
    lines = dump.read_text().splitlines() if dump.exists() else []
    return [json.loads(line)["score"] for line in lines]


def paired_error(before: list[float], after: list[float]) -> float:
    """Standard error of the mean difference; NaN for too few problems."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if len(differences) < 2:
        return math.nan
    return statistics.stdev(differences) / math.sqrt(len(differences))


def change(values: list[float], digits: int) -> str:
    """First and last value; a dash if there is none (no evaluation, every step skipped)."""
    return f"{values[0]:.{digits}f} → {values[-1]:.{digits}f}" if values else "–"


def summary(label: str, run: Path) -> dict[str, str]:
    rows = read_metrics(run)
    steps, scores = series(rows, SCORE)

    def gain(index: int) -> str:
        error = paired_error(test_scores(run, steps[0]), test_scores(run, steps[index]))
        return f"{scores[index]:.3f} ({scores[index] - scores[0]:+.3f} ± {error:.3f})"

    best = max(range(len(scores)), key=scores.__getitem__, default=None)
    return {
        "run": label,
        "test before": f"{scores[0]:.3f}" if scores else "–",
        "best": f"{gain(best)} at step {steps[best]}" if scores else "–",
        "last": gain(-1) if scores else "–",
        "sampled": change(series(rows, "test/sampled_score")[1], 3),
        "reward": change(series(rows, REWARD)[1], 3),
        "loss": change(series(rows, LOSS)[1], 4),
        "entropy": change(series(rows, ENTROPY)[1], 3),
        "length": change(series(rows, LENGTH)[1], 1),
    }


def without_empty_columns(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Only the columns that supervised runs have, if there are no others."""
    filled = [name for name in rows[0] if any(row[name] != "–" for row in rows)]
    return [{name: row[name] for name in filled} for row in rows]


def table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def draw(names: list[str], runs: list[Path], png: Path) -> None:
    import matplotlib  # here, so that --help needs nothing installed

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = [read_metrics(run) for run in runs]
    panels = [name for name in TITLES if any(name in row for rows in metrics for row in rows)]
    if not panels:
        sys.exit(readable(f"report: {', '.join(map(str, runs))}: no loss, reward or score to draw"))
    n_columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    size = (5 * n_columns, 3.2 * n_rows)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=size, sharex=True, layout="constrained", squeeze=False
    )
    for axis in list(grid.flat)[len(panels) :]:
        axis.remove()
    axes = dict(zip(panels, grid.flat, strict=False))
    if len(runs) > 1 and LOSS in axes:
        # losses of different kinds differ by orders of magnitude, and some are negative
        axes[LOSS].set_yscale("symlog", linthresh=1e-5)
    for name, axis in axes.items():
        for i, (label, run, rows) in enumerate(zip(names, runs, metrics, strict=True)):
            steps, values = series(rows, name)
            color = COLORS[i % len(COLORS)]
            marker = "o" if name == SCORE or len(values) == 1 else None
            axis.plot(steps, values, color=color, marker=marker, markersize=4, label=label)
            n = len(test_scores(run, steps[0])) if name == SCORE and steps else 0
            if n:
                errors = [math.sqrt(max(value * (1 - value), 0) / n) for value in values]
                low = [value - error for value, error in zip(values, errors, strict=True)]
                high = [value + error for value, error in zip(values, errors, strict=True)]
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_title(TITLES[name], fontsize=11)
        axis.set_xlabel("Step")
        axis.tick_params(labelbottom=True)  # of all, also where the panel below is missing
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if LENGTH in axes:
        low, high = axes[LENGTH].get_ylim()
        if high - low < 2:  # a hundredth of a token must not look like a change
            axes[LENGTH].set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
    if len(runs) > 1:
        axes[panels[0]].legend(frameon=False)
    band = ": band = one binomial standard error" if SCORE in axes else ""
    figure.suptitle(f"{', '.join(names)}{band}", fontsize=10)
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=130)
    except (OSError, ValueError) as error:  # invalid folder, unknown kind of picture
        sys.exit(readable(f"report: --png {png}: cannot be written ({error})"))


def readable(text: str) -> str:
    """Escape control characters in the name of a folder."""
    from RL2.runtime import secrets  # --help needs nothing installed

    return secrets.readable(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (trainer.save_dir)")
    parser.add_argument("--png", type=Path, required=True, help="where the picture goes")
    return parser.parse_args()


def main(args: argparse.Namespace | None = None) -> None:
    args = args or arguments()
    names = list(map(readable, labels(args.runs)))
    print(table(without_empty_columns(list(map(summary, names, args.runs)))))
    draw(names, args.runs, args.png)
    print(readable(f"picture:     {args.png}"))
    for run in args.runs:
        found = {
            "model": run / "final",
            "best model": run / "best",
            "checkpoints": run / "checkpoints",
            "metrics": run / "metrics.jsonl",
            "rollouts": run / "rollouts",
        }
        for what, path in found.items():
            if path.exists():
                print(readable(f"{what + ':':<12} {path}"))


if __name__ == "__main__":
    given = arguments()
    from RL2.runtime.streams import keep_streams  # --help needs nothing installed

    keep_streams()  # draw the picture even if the table's reader is gone
    main(given)
