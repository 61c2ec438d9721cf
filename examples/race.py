"""The table of a race: algorithms on one task, several seeds each, at equal generated tokens.

    python examples/race.py runs/race --out runs/race/table.md

Expects runs at `<folder>/<seed>/<algorithm>` with their `metrics.jsonl`, as `examples/race.sh`
leaves them. All runs are compared at the budget of the one that generated the fewest tokens: the
last evaluation of each run within that budget counts. The score on the problems that are trained on
is that of the samples of three steps. A gain is the mean over the seeds with its 95 % interval
(Student's t).
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from report import SCORE, read_metrics, readable

SAMPLED, TRAINED = "test/sampled_score", "train/score"
ENTROPY, LENGTH = "actor/entropy", "train/avg_response_length"
TOKENS = "rollout/tokens"
# 97.5 % points of Student's t with n - 1 degrees of freedom, by the number of seeds n.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
COLUMNS = (
    "algorithm", "trained on", "unseen, sampled", "unseen, greedy", "entropy", "length", "tokens",
    "skipped",
)  # fmt: skip
N_MEAN = 3  # steps whose mean is the score on the problems that are trained on


def tokens_by_step(rows: list[dict[str, float]]) -> dict[int, float]:
    """Tokens generated up to each step, the step included; 0 at step 0."""
    total, found = 0.0, {0: 0.0}
    for row in rows:
        total += row.get(TOKENS, 0.0)
        found[row["step"]] = total
    return found


def at_budget(rows: list[dict[str, float]], budget: float) -> dict[str, float]:
    """What a run had reached when it had generated at most `budget` tokens: its scores before and
    at the last evaluation within, and its other metrics at that step."""
    spent = tokens_by_step(rows)
    evaluated = [row for row in rows if SCORE in row and spent[row["step"]] <= budget]
    first, last = evaluated[0], evaluated[-1]
    trained = [row for row in rows if 0 < row["step"] <= last["step"]]
    found = {
        "tokens": spent[last["step"]],
        "skipped": sum(row.get("actor/skipped", 0.0) for row in trained),
    }
    for name, key in (("greedy", SCORE), ("sampled", SAMPLED)):
        found[f"{name} before"], found[name] = first[key], last[key]
    scores = [row[TRAINED] for row in trained if TRAINED in row] or [math.nan]
    found["trained before"] = statistics.fmean(scores[:N_MEAN])
    found["trained"] = statistics.fmean(scores[-N_MEAN:])
    for name, key in (("entropy", ENTROPY), ("length", LENGTH)):
        values = [row[key] for row in trained if key in row]
        found[f"{name} before"], found[name] = (
            (values[0], values[-1]) if values else (math.nan,) * 2
        )
    return found


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean of two values or more."""
    return STUDENT.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))


def line(algorithm: str, seeds: list[dict[str, float]]) -> dict[str, str]:
    """One row of the table, from what the runs of each seed had reached."""

    def mean(name: str) -> float:
        return statistics.fmean(run[name] for run in seeds)

    def gain(name: str) -> str:
        gains = [run[name] - run[f"{name} before"] for run in seeds]
        width = f" ± {interval(gains):.3f}" if len(gains) > 1 else ""
        return f"{mean(name):.3f} ({statistics.fmean(gains):+.3f}{width})"

    return {
        "algorithm": algorithm,
        "trained on": gain("trained"),
        "unseen, sampled": gain("sampled"),
        "unseen, greedy": gain("greedy"),
        "entropy": f"{mean('entropy before'):.3f} → {mean('entropy'):.3f}",
        "length": f"{mean('length before'):.1f} → {mean('length'):.1f}",
        "tokens": f"{mean('tokens') / 1e3:.0f}k",
        "skipped": f"{mean('skipped'):.1f}",
    }


def table(folder: Path) -> str:
    """The table in Markdown, the largest gain on the problems that were trained on first."""
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for path in sorted(folder.glob("*/*/metrics.jsonl")):
        rows = read_metrics(path.parent)
        if any(TOKENS in row for row in rows) and any(SCORE in row for row in rows):
            runs.setdefault(path.parent.name, []).append(rows)
    if not runs:
        sys.exit(readable(f"race: {folder}: no runs with rollouts in <seed>/<algorithm>"))
    budget = min(tokens_by_step(rows)[rows[-1]["step"]] for of in runs.values() for rows in of)
    reached = {name: [at_budget(rows, budget) for rows in of] for name, of in runs.items()}

    def gained(name: str) -> float:
        return statistics.fmean(run["trained"] - run["trained before"] for run in reached[name])

    lines = [line(name, reached[name]) for name in sorted(reached, key=gained, reverse=True)]
    n_seeds = {len(of) for of in runs.values()}
    seeds = f"{min(n_seeds)} to {max(n_seeds)}" if len(n_seeds) > 1 else f"{min(n_seeds)}"
    head = [f"Budget: {budget / 1e3:.0f}k generated tokens a run; seeds: {seeds}.", ""]
    cells = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(row.values()) for row in lines)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in cells)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the race")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to as well")
    args = parser.parse_args()
    text = table(args.folder)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
