"""The quickstart's word problems: right answers, no problem in two splits, all from the seed."""

import ast
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

from envs.gsm8k import extract_answer
from RL2.datasets.readers import load_rows

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"warmup": 600, "train": 400, "test": 200}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def write(out: Path, seed: int) -> Path:
    sizes = [f"--{name}={size}" for name, size in SPLITS.items()]
    command = [sys.executable, "examples/word_problems.py", f"--out={out}", f"--seed={seed}"]
    subprocess.run(command + sizes, cwd=ROOT, check=True, capture_output=True)
    return out / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("seed0"), 0)


def read(data: Path) -> dict[str, list[dict[str, str]]]:
    return {name: load_rows(str(data / f"{name}.jsonl"), "data").rows for name in SPLITS}


def value(expression: str) -> int:
    """A sum of integers, by walking its syntax tree."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        return OPERATORS[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(expression, mode="eval").body)


def told(question: str) -> int:
    """The answer from the story alone: what there is at first, comes, multiplies and goes."""
    total = 0
    for sentence in question.split("."):
        number = re.search(r"\d+", sentence)
        if number is None:
            continue
        n = int(number[0])
        if " has " in sentence:
            total = n
        elif " more" in sentence:
            total += n
        elif " times" in sentence:
            total *= n
        else:
            assert " gives " in sentence
            total -= n
    return total


def test_sizes_and_keys(data):
    for name, rows in read(data).items():
        assert len(rows) == SPLITS[name]
        assert all(row.keys() == {"question", "answer"} for row in rows)


def test_answers_follow_from_the_story_and_from_the_worked_steps(data):
    for rows in read(data).values():
        for row in rows:
            *work, _ = row["answer"].splitlines()
            answer = int(extract_answer(row["answer"]))
            assert answer == told(row["question"]) > 0
            last = 0
            for line in work:
                expression, *results = line.split("=")
                last = value(expression)
                assert [int(result) for result in results] in ([], [last])
            assert last == answer


def test_no_question_occurs_twice_in_or_across_splits(data):
    questions = [row["question"] for rows in read(data).values() for row in rows]
    assert len(set(questions)) == sum(SPLITS.values())


def test_rows_follow_from_the_seed(data, tmp_path):
    again, other = write(tmp_path / "again", 0), write(tmp_path / "other", 1)
    for name in SPLITS:
        rows = (data / f"{name}.jsonl").read_bytes()
        assert (again / f"{name}.jsonl").read_bytes() == rows
        assert (other / f"{name}.jsonl").read_bytes() != rows


def test_problems_vary(data):
    rows = read(data)["train"]
    answers = {extract_answer(row["answer"]) for row in rows}
    shapes = {re.sub(r"[A-Z]\w+|\d+", "_", row["question"]) for row in rows}
    assert len(answers) > 20 and len(shapes) >= 4
    gains = sum(" more." in row["question"] for row in rows)
    assert 0.4 * len(rows) < gains < 0.6 * len(rows)  # the others are losses
