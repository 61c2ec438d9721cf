"""One process against two: weak and strong scaling of the update and of a whole step.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --spread actor.tp_size=2 actor.sp_size=2 actor.ddp_size=2

The contestants are runs of the trainer (see `benchmarks/step.py`) on CPU with gloo, one thread a
process: one process; two processes with the same batch (strong); two with twice the prompts (weak);
and two with the same batch for each `--spread`. They take steps in turns, and those who do not
stand still. Efficiency is the time of one process over that of two, halved where both share the
same batch.

`two, apart` are two runs of one process at the same time, which know nothing of each other: what
the machine's cores, caches and memory leave of 100 %, and so the aim of the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import Process  # noqa: E402
from benchmarks.step import median_of, our_lines, parser, start_ours, write_files  # noqa: E402
from RL2.engines.servers.addresses import free_port  # noqa: E402

COLUMNS = ("step", "rollout", "update_actor", "update_rollout")


class Run:
    """The ranks of one run, which take a step together.

    n_ranks: processes; n_prompts: of a step; spread: further overrides of the trainer. apart: they
    are runs of their own, each with `n_prompts`.
    """

    def __init__(
        self,
        folder: Path,
        options: argparse.Namespace,
        name: str,
        n_ranks: int = 1,
        n_prompts: int | None = None,
        spread: tuple[str, ...] = (),
        apart: bool = False,
    ):
        n_prompts = n_prompts or options.prompts
        self.name = name
        self.share = n_prompts / options.prompts / (1 if apart else n_ranks)
        longest = options.prompt_length + options.new_tokens

        def start_run(size: int) -> list[Process]:
            lines = our_lines(
                folder, options, trainer__save_dir=tempfile.mkdtemp(dir=folder),
                train_data__prompts_per_rollout=n_prompts,
                actor__max_length_per_device=options.sequences * longest,
            )  # fmt: skip
            group = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            }  # fmt: skip
            return [
                start_ours(
                    [*lines, *spread], options.threads, **group, RANK=str(r), LOCAL_RANK=str(r)
                )
                for r in range(size)
            ]

        sizes = [1] * n_ranks if apart else [n_ranks]
        self.ranks = [process for size in sizes for process in start_run(size)]
        for rank in self.ranks:
            rank.answer()

    def step(self) -> dict:
        """Rank 0's answer when all have taken a step; its memory is that of the largest."""
        for rank in self.ranks:
            rank.send({})
        answers = [rank.answer() for rank in self.ranks]
        return answers[0] | {"peak_gib": max(answer["peak_gib"] for answer in answers)}

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def runs(folder: Path, options: argparse.Namespace) -> list[Run]:
    spreads = {spread: tuple(spread.split(",")) for spread in options.spread}
    return [
        Run(folder, options, "one"),
        Run(folder, options, "two, apart", 2, apart=True),
        Run(folder, options, "two, strong", 2),
        Run(folder, options, "two, weak", 2, 2 * options.prompts),
        *(Run(folder, options, f"two, {s}", 2, spread=lines) for s, lines in spreads.items()),
    ]


def measure(options: argparse.Namespace, folder: Path) -> None:
    # The prompts of the widest step: every step of every run draws from these.
    size = write_files(
        folder, argparse.Namespace(**vars(options) | {"prompts": 2 * options.prompts})
    )
    print(
        f"\n{size}, vocabulary {options.vocab}, {options.prompts} prompts of "
        f"{options.prompt_length} tokens x {options.responses} responses of {options.new_tokens} "
        f"(weak: twice the prompts), {options.threads} thread(s) a process, {options.rounds} steps "
        f"in turns, median seconds and efficiency\n"
    )
    contestants = runs(folder, options)
    steps: dict[str, list[dict]] = {run.name: [] for run in contestants}
    for _ in range(options.warmup + options.rounds):
        for run in contestants:
            steps[run.name].append(run.step())
    for run in contestants:
        run.close()
    one = steps[contestants[0].name][options.warmup :]
    print("| processes | " + " | ".join(COLUMNS) + " | peak GiB of a process |")
    print("| --- |" + " ---: |" * (len(COLUMNS) + 1))
    for run in contestants:
        them = steps[run.name][options.warmup :]
        cells = [
            f"{seconds_of(them, column):.3f} ({efficiency(one, them, column, run.share):.0%})"
            for column in COLUMNS
        ]
        print(f"| {run.name} | " + " | ".join(cells) + f" | {them[-1]['peak_gib']:.2f} |")


def seconds_of(steps: list[dict], column: str) -> float:
    return median_of(steps, None if column == "step" else column)


def efficiency(one: list[dict], them: list[dict], column: str, share: float) -> float:
    """Median over the rounds. share: work of each of their processes, in that of `one`."""

    def seconds(step: dict) -> float:
        return step["seconds"] if column == "step" else step["phases"][column]

    return statistics.median(
        share * seconds(a) / seconds(b) for a, b in zip(one, them, strict=True)
    )


def main() -> None:
    options = parser()
    options.set_defaults(vocab=2048, new_tokens=64)
    options.add_argument("--sequences", type=int, default=16, help="in one forward on a rank")
    options.add_argument(
        "--spread", nargs="*", default=[], help="keys of further runs, commas within one"
    )
    options = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="rl2-scaling-") as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
