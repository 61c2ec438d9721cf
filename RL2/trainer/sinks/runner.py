"""A sink in a process of its own, so that the training never waits for it.

    python runner.py

`RL2.trainer.sinks.process` starts it under a guard and sends it a byte whenever `metrics.jsonl` has
grown. That file is the queue, so nothing blocks and nothing is dropped. Standard input: one line of
JSON (see `main`), then these bytes, the last of them `GOOD` or `BAD` for how the run ended.
Standard output: messages for the user, one per line.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

GROWN, GOOD, BAD = b"+", b".", b"!"
REPORTED = 3  # exit status after the reason was reported


def new_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The rows of a growing file beyond its position; half a row is left for later."""
    while (line := file.readline()).endswith(b"\n"):
        yield json.loads(line)
    file.seek(-len(line), os.SEEK_CUR)


def main() -> int:
    """Follow a run. The JSON has `sink`, module and class; `sys_path`, the trainer's; `run`, the
    fields of `TrackedRun`; `metrics` and `offset`, the file and where its new rows begin."""
    for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR"):
        if number := getattr(signal, f"SIG{name}", None):
            signal.signal(number, signal.SIG_IGN)  # ends with its input; a guard may kill it
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # hides what packages print
    words = sys.stdin.buffer
    order = json.loads(words.readline())
    sys.path[:] = order["sys_path"]
    try:
        module, name = order["sink"]
        kind = getattr(importlib.import_module(module), name)
        run = importlib.import_module("RL2.trainer.sinks.sink").TrackedRun(**order["run"])
        sink = kind(run, lambda line: report.write(f"{line}\n"))
        last = BAD  # a trainer that is killed says nothing
        with open(order["metrics"], "rb") as file:
            file.seek(order["offset"])
            while last != GOOD and (word := words.read1()):
                last = word[-1:]
                for row in new_rows(file):
                    sink.log(row.pop("step"), row)
        sink.close(last == GOOD)
    except Exception as error:  # must not look like an error of the training
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        report.write(f"{why}; it gets no more rows, {order['metrics']} has every step\n")
        report.flush()
        os._exit(REPORTED)  # a package's hooks would wait for a process that may be gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
