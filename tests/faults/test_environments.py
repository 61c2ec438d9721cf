"""Environments that do what they should not cost their own samples and nothing else."""

import os
import re
import signal
import time
from itertools import product

import pytest

from tests.faults.support import LONG, Run
from tests.rollout.support import running, wait_until
from tests.trainer.support import lasting, rows_of, same_weights, weights, write_env, write_files

# What goes wrong with the prompts of one row each, in some of the answers to it.
KINDS = [
    "raise ValueError('no')",
    "await asyncio.sleep(1000)",
    "time.sleep(1000)",
    "return None",
    "answer['reward'] = float('nan')",
    "answer['score'] = -math.inf",
    "return 'good'",
    "del answer['done']",
    "answer['next_state'] = 'x' * 2**30",
    "os._exit(3)",
    "os.kill(os.getpid(), 9)",
    "sys.exit(3)",
    "raise KeyboardInterrupt",
    "while True: pass",
    "re.match('(a+)+$', 'a' * 64 + 'b')",
    "step.__globals__['recurse']()",
    "answer['extra_info'] = {'lock': threading.Lock()}",
    "os.closerange(3, 1000); await asyncio.sleep(1000)",
    "await asyncio.to_thread(os._exit, 3)",
    "asyncio.current_task().cancel(); await asyncio.sleep(1000)",
    "asyncio.get_running_loop().stop(); await asyncio.sleep(1000)",
    "answer['reward'] = '1'",
    "answer['done'] = 'yes'",
    "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})",
]
BAD = """
import asyncio, math, os, re, sys, threading, time

def recurse():
    recurse()

async def step(state, action, extra_info):
    good = float(sum(map(ord, action)) % 2)
    answer = {"next_state": state, "reward": good, "score": good, "done": True}
    if sum(map(ord, action)) % 5 == 0:
        print("something that an environment has to say")
        await misbehave(int(state.split()[0]), answer)
    return answer
"""


def environment(tmp_path, kinds):
    """Files of two environments that fail at the same samples: all in one way, and each in its."""
    lines = "".join(
        f"    async def kind{i}(answer):\n        {kind}\n        return answer\n"
        for i, kind in enumerate(kinds)
    )
    # Whatever a kind returns instead of the answer is returned by `step`.
    bad = BAD.replace("await misbehave", "return await misbehave")
    table = ", ".join(f"kind{i}" for i in range(len(kinds)))
    body = f"{lines}    return await [{table}][row](answer)\n"
    raising = "    raise ValueError('no')\n"
    head = "async def misbehave(row, answer):\n"
    return (
        write_env(tmp_path / "raising.py", f"{bad}\n{head}{raising}"),
        write_env(tmp_path / "bad.py", f"{bad}\n{head}{body}"),
    )


CASES = list(product(("ppo", "spo"), (1, 2))) if LONG else [("ppo", 2)]


@pytest.mark.parametrize(("trainer", "n_ranks"), CASES)
def test_a_run_loses_what_fails_and_nothing_else(tmp_path, trainer, n_ranks):
    """Baselines, losses and weights are, bit for bit, those of a run that loses the same samples
    to plain exceptions."""
    files = write_files(tmp_path / "files")
    raising, bad = environment(tmp_path, KINDS)
    changes = {
        "train_data__responses_per_prompt": 4, "rollout__max_env_errors": "null",
        "rollout__env_timeout": 3.0, "actor__lr": "1e-2", "rollout__max_resampled": 2,
    }  # fmt: skip
    one = Run(files, trainer, tmp_path / "one", n_ranks, rollout__env_path=raising,
              rollout__env_workers=0, **changes)  # fmt: skip
    one.finish()
    run = Run(files, trainer, tmp_path / "run", n_ranks, rollout__env_path=bad, **changes)
    codes = run.wait(timeout=500)
    assert not any(codes), run.output()
    rows, expected = ([lasting(row) for row in rows_of(each.folder)] for each in (run, one))
    for row in (*rows, *expected):  # what says why a sample failed crosses ranks, too
        row.pop("comm/samples_bytes", None)
    assert rows == expected
    assert rows[-1]["rollout/env_errors"] >= 12
    assert same_weights(weights(run.folder / "final"), weights(one.folder / "final"))
    dropped = re.findall(r"(?:(\d+) samples|sample) dropped", run.output())
    assert sum(int(n or 1) for n in dropped) == rows[-1]["rollout/env_errors"]
    assert len(dropped) <= len(KINDS) * len(rows)  # one line for one kind of failure
    assert not running(bad)


HANGS = """
import re
from pathlib import Path

async def step(state, action, extra_info):
    Path(__file__).with_suffix(".begun").touch()
    re.match('(a+)+$', 'a' * 64 + 'b')
"""


def test_a_run_whose_environment_hangs_stops_as_soon_as_that_is_clear(tmp_path):
    """Not after the limit of each of its calls."""
    files = write_files(tmp_path / "files")
    env = write_env(tmp_path / "hangs.py", HANGS)
    run = Run(files, "spo", tmp_path / "run", rollout__env_path=env, rollout__env_timeout=1.0,
              rollout__max_env_errors=1, rollout__env_workers=1,
              train_data__responses_per_prompt=16)  # fmt: skip
    assert run.wait(timeout=60) == [1]
    assert "EnvError: rollout.max_env_errors=1: the environment failed for 2 of" in run.output()
    assert not running(env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_environment_behind(tmp_path, number):
    files = write_files(tmp_path / "files")
    env = write_env(tmp_path / "hangs.py", HANGS)
    run = Run(files, "spo", tmp_path / "run", rollout__env_path=env, rollout__env_timeout=1000)
    wait_until(env.with_suffix(".begun").exists)
    assert running(env)
    start = time.monotonic()
    os.kill(run.ranks[0].pid, number)
    (code,) = run.wait(timeout=60)
    assert code == (128 + number if number == signal.SIGTERM else -number), run.output()
    assert time.monotonic() - start < 30
    wait_until(lambda: not running(env), seconds=10)
