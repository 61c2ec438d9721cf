"""Contestants of a benchmark in processes of their own, which work when they are told to.

Orders and answers are lines of JSON over pipes. Only the standard library is imported: another
environment's interpreter runs this, too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class Process:
    """One contestant, seen from the benchmark.

    Args:
        command: what to start; its standard error goes where ours does.
        **environment: variables to set.
    """

    def __init__(self, command: list[str], **environment: str):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | environment,
        )  # fmt: skip

    def send(self, order: dict) -> None:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict:
        """The next answer. Raises RuntimeError where the process ends instead."""
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self._process.args[0]} ended with {self._process.wait()}; see above")

    def ask(self, order: dict) -> dict:
        self.send(order)
        return self.answer()

    def close(self) -> None:
        """No more orders: wait until it has ended."""
        self._process.stdin.close()
        self._process.wait()


def orders_and_answer() -> tuple[Iterator[dict], Callable[[dict], None]]:
    """Within a contestant: the orders as they come, and a function that answers one.

    What anybody else prints goes to standard error from now on.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    return map(json.loads, sys.stdin), answer


def peak_gib() -> float:
    """The most memory that this process has held at a time."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 2**20
