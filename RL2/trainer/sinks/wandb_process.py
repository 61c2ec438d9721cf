"""wandb, in a process of its own: whatever happens to it, the training does not wait for it.

    python wandb_process.py

`RL2.trainer.sinks.metrics` starts it under a guard and pokes it whenever `metrics.jsonl` has
grown. That file is the queue: nobody waits for a full one, and nothing is dropped. Standard input:
one line of JSON (see `main`), then a byte for each poke, the last one of them `GOOD` or `BAD` for
how the run ended. Standard output: what the user has to know, a line each. It needs nothing of
RL2.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

GROWN, GOOD, BAD = b"+", b".", b"!"
TOLD = 3  # exit status where the reason was told


def new_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The rows that stand in a growing file beyond its position; half a row is left for later."""
    while (line := file.readline()).endswith(b"\n"):
        yield json.loads(line)
    file.seek(-len(line), os.SEEK_CUR)


def start(settings: dict[str, Any], trainer: int, program: str, tell: Callable[[str], None]):
    """A wandb run; without a key or a server that answers it is an offline one, said once."""
    import wandb

    timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))
    quiet = wandb.Settings(
        silent=True, console="off", init_timeout=timeout, program=program, x_stats_pid=trainer
    )
    mode = os.environ.get("WANDB_MODE")
    try:
        # Without a key, init would ask for one on a terminal.
        if mode is not None or wandb.login(prompt=False):
            return wandb.init(**settings, mode=mode, settings=quiet)
        problem = "no API key"
    except (wandb.errors.Error, ValueError, OSError) as error:
        problem = _first_line(error)
    wandb.teardown()  # a service that still tries would say that the run's id is in use
    run = wandb.init(**settings, mode="offline", settings=quiet)
    tell(
        f"{problem}; logging offline under {settings['dir']} (`wandb login`, or "
        "trainer.use_wandb=false)"
    )
    return run


def main() -> int:
    """Follow a run. Its JSON: `settings` of wandb.init, `trainer` (its process id), `program`, and
    `metrics` and `offset`, the file and where its new rows begin."""
    for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR"):
        if number := getattr(signal, f"SIG{name}", None):
            signal.signal(number, signal.SIG_IGN)  # the end of our input says when, a guard kills
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # wandb's own words
    words = sys.stdin.buffer
    order = json.loads(words.readline())
    try:
        run = start(
            order["settings"], order["trainer"], order["program"],
            tell=lambda line: report.write(f"{line}\n"),
        )  # fmt: skip
        last = BAD  # a trainer that is killed says nothing
        with open(order["metrics"], "rb") as file:
            file.seek(order["offset"])
            while last != GOOD and (word := words.read1()):
                last = word[-1:]
                for row in new_rows(file):
                    run.log(row, step=row.pop("step"))
        run.finish(exit_code=int(last != GOOD))
    except Exception as error:  # whatever it is, it must not look like the training's
        report.write(
            f"{_first_line(error)}; it gets nothing more, {order['metrics']} has every step\n"
        )
        report.flush()
        os._exit(TOLD)  # wandb's hooks would wait for a process that may be gone
    return 0


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
