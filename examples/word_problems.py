"""Write the quickstart's data: word problems in GSM8K's form.

    python examples/word_problems.py --out runs/quickstart --seed 0

makes, under `--out`:

    data/warmup.jsonl    problems with worked answers, for supervised warm-up
    data/train.jsonl     other problems, for rollouts
    data/test.jsonl      1,024 problems that occur in neither

Rows have GSM8K's form: `question`, a worked `answer`, and the number after `####`. The result
depends only on the seed. Left out: distractors, units, fractions, problems with several steps.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana Ian Joy Kim Leo Mia Noa Omar Pia".split()
ITEMS = "apples books cards coins eggs kites marbles pens shells stamps".split()


def problem(rng: random.Random) -> dict[str, str]:
    """One problem with one step, a gain or a loss, worked as a sum.

    The step's result is only after `####`. If it were also written before, that token could be
    wrong while the answer is right, as a model can look at the question again; a reward that only
    sees the answer would then teach the mistake (12 % of the correct samples, in a trial).
    """
    name, friend = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    start = rng.randint(3, 25)
    if rng.random() < 0.5:
        amount = rng.randint(2, start - 1)
        change, sign = f"{name} gives {amount} {items} to {friend}.", "-"
        total = start - amount
    else:
        amount = rng.randint(2, 25)
        change, sign = f"{friend} gives {name} {amount} {items} more.", "+"
        total = start + amount
    question = f"{name} has {start} {items}. {change} How many {items} does {name} have now?"
    return {"question": question, "answer": f"{start} {sign} {amount}\n#### {total}"}


def distinct_problems(rng: random.Random) -> Iterator[dict[str, str]]:
    seen = set()
    while True:
        row = problem(rng)
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=16384, help="rows for the warm-up")
    parser.add_argument("--train", type=int, default=32768, help="rows for rollouts")
    parser.add_argument("--test", type=int, default=1024, help="rows for evaluation")
    args = parser.parse_args()

    problems = distinct_problems(random.Random(args.seed))
    splits = {
        name: [next(problems) for _ in range(getattr(args, name))]
        for name in ("warmup", "train", "test")
    }
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with (data / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"wrote {data}: {', '.join(f'{len(rows)} {name}' for name, rows in splits.items())}")


if __name__ == "__main__":
    main()
