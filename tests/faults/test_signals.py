"""A run that is asked to stop saves at once, ends, and goes on as if nothing had been."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import product

import pytest

from RL2.runtime.stop import NUMBERS
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.integrity import damage
from tests.faults.support import LONG, Run, assert_nothing_half, assert_same_run, points
from tests.trainer.support import environ, overrides, rows_of, write_files, write_model

GRACE = 30  # seconds that torchrun gives between SIGTERM and SIGKILL

# Waits at the so manyth answer of a phase until somebody takes the file away.
ENVIRONMENT = """
import asyncio
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


async def step(state, action, extra_info):
    global calls
    calls += 1
    if (HERE / "wait").exists() and calls >= int((HERE / "wait").read_text()):
        (HERE / "waits").touch()
        while (HERE / "wait").exists():
            await asyncio.sleep(0.01)
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""
# The same within the update, which goes on when it may.
LOSS = """
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


def nll(logps):
    global calls
    calls += len(logps) > 3  # not those of the trial
    if (HERE / "wait").exists() and calls >= int((HERE / "wait").read_text()):
        (HERE / "waits").touch()
        time.sleep(1)
    return -logps
"""
SETTINGS = {
    "test_data__max_examples": 4, "trainer__test_freq": 2, "actor__lr": "1e-2",
    "trainer__n_epochs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    write_model(files / "dropout", "gpt2", std=0.2)
    (files / "waiting.py").write_text(ENVIRONMENT)
    (files / "loss.py").write_text(LOSS)
    return files


def settings(files, trainer, staleness=0):
    if trainer == "sft":
        return {
            "actor__model_name": files / "dropout", "actor__lr": "1e-2", "trainer__n_epochs": 2,
            "actor__loss__import_path": f"{files / 'loss.py'}:nll",
        }  # fmt: skip
    return SETTINGS | {
        "rollout__env_path": files / "waiting.py", "test_data__path": files / "rows.jsonl",
        "rollout__staleness": staleness, "rollout__env_workers": 1,  # which counts all calls
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Call with (trainer, ranks, staleness): the folder of a run that nobody disturbs."""
    runs = {}

    def run(*key):
        if key not in runs:
            trainer, n_ranks, staleness = key
            runs[key] = tmp_path_factory.mktemp("whole") / "run"
            changes = settings(files, trainer, staleness)
            Run(files, trainer, runs[key], n_ranks, **changes).finish()
        return runs[key]

    return run


def stopped(files, run, number):
    """Exit codes and seconds after a signal to all ranks, once one of them waits."""
    deadline = time.monotonic() + 60
    while not (files / "waits").exists():
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.01)
    start = time.monotonic()
    for process in run.ranks:
        os.kill(process.pid, number)
    codes = run.wait(timeout=GRACE, end_others=False)
    return codes, time.monotonic() - start


# Calls of the environment, shared by the ranks: 4 tests at step 0 and after steps 2, 4 and 6, and 8
# samples a step.
PLACES = {
    "evaluation before the first step": 2,
    "first rollout": 6,
    "second rollout": 16,
    "evaluation": 22,
    "third rollout": 28,
}
ALL = [(*case, n_ranks) for case in product(PLACES, (0, 1)) for n_ranks in (1, 2)]
SOME = [("first rollout", 0, 1), ("evaluation", 0, 2), ("third rollout", 1, 2)]


@pytest.mark.parametrize(("place", "staleness", "n_ranks"), ALL if LONG else SOME)
def test_stopped_while_it_generates(files, whole, tmp_path, place, staleness, n_ranks):
    # Each signal somewhere.
    number = NUMBERS[(list(PLACES).index(place) + 5 * staleness + n_ranks) % len(NUMBERS)]
    changes = settings(files, "spo", staleness)
    expected = whole("spo", n_ranks, staleness)
    folder = tmp_path / "run"
    try:
        (files / "wait").write_text(str(PLACES[place] // n_ranks))
        run = Run(files, "spo", folder, n_ranks, **changes)
        codes, seconds = stopped(files, run, number)
    finally:
        for name in ("wait", "waits"):
            (files / name).unlink(missing_ok=True)
    assert codes == [128 + number] * n_ranks, run.output()
    assert seconds < GRACE
    assert "asked to stop" in run.output() and "Traceback" not in run.output()
    assert_nothing_half(folder)
    rest = Run(files, "spo", folder, n_ranks, trainer__load_ckpt_from="latest", **changes)
    rest.finish()
    if staleness == 0 or PLACES[place] <= PLACES["first rollout"]:
        assert_same_run(folder, expected)
    else:  # what was generated ahead is generated anew, by newer weights
        steps, others = ([row["step"] for row in rows_of(run)] for run in (folder, expected))
        assert steps == others


@pytest.mark.parametrize("seed", points(few=1, many=10))
def test_what_is_generated_ahead_gets_time_to_be_complete(files, whole, tmp_path, seed):
    """Wherever the signal comes: the run that goes on has the answers of the weights before."""
    chance, n_ranks = random.Random(seed), 1 + seed % 2
    (files / "slow.py").write_text(ENVIRONMENT.replace("calls += 1", "await asyncio.sleep(0.3)"))
    changes = settings(files, "spo", 1) | {"rollout__env_path": files / "slow.py"}
    expected = whole("spo", n_ranks, 1)
    folder = tmp_path / "run"
    run = Run(files, "spo", folder, n_ranks, **changes)
    while not (folder / "rollouts/step000002_train.jsonl").exists():
        assert all(process.is_alive() for process in run.ranks), run.output()
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1.5))
    for process in run.ranks:
        os.kill(process.pid, signal.SIGTERM)
    codes = run.wait(timeout=GRACE, end_others=False)
    assert codes in ([128 + signal.SIGTERM] * n_ranks, [0] * n_ranks), run.output()
    Run(files, "spo", folder, n_ranks, trainer__load_ckpt_from="latest", **changes).finish()
    assert_same_run(folder, expected)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_stopped_while_it_updates(files, whole, tmp_path, n_ranks):
    """The update comes to its end; the random state that dropout needs is saved."""
    changes = settings(files, "sft")
    expected = whole("sft", n_ranks, 0)
    folder = tmp_path / "run"
    try:
        (files / "wait").write_text("3")
        run = Run(files, "sft", folder, n_ranks, **changes)
        codes, seconds = stopped(files, run, signal.SIGTERM)
    finally:
        for name in ("wait", "waits"):
            (files / name).unlink(missing_ok=True)
    assert codes == [128 + signal.SIGTERM] * n_ranks, run.output()
    assert seconds < GRACE
    saved = Checkpoints(folder).steps()
    assert len(saved) == 1 and damage(saved[0]) is None
    Run(files, "sft", folder, n_ranks, trainer__load_ckpt_from="latest", **changes).finish()
    assert_same_run(folder, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_waits_for_other_ranks_ends_at_once(files, tmp_path, number):
    """In C++ code, which lets no handler of Python run."""
    with socket.socket() as rank_0:
        rank_0.bind(("127.0.0.1", 0))
        rank_0.listen()
        rank_0.settimeout(90)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rank_0.getsockname()[1])}
        process = subprocess.Popen(
            [sys.executable, "-m", "RL2.trainer.sft", *overrides(files, "sft", tmp_path / "run")],
            env=environ(RANK="1", WORLD_SIZE="2", **place), stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            # It looks whether somebody listens, then waits for what that one says.
            answers = [rank_0.accept()[0] for _ in range(2)]
            time.sleep(0.5)
            process.send_signal(number)
            assert process.wait(GRACE) == -number
        finally:
            process.kill()
            process.communicate()
        for answer in answers:
            answer.close()
    assert not (tmp_path / "run").exists()
