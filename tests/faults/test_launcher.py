"""torchrun, killed or left with a process less: everything ends, and the next run goes on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.integrity import damage
from tests.faults.support import LONG, Run
from tests.trainer.support import environ, lasting, overrides, rows_of, write_files

long = pytest.mark.skipif(not LONG, reason="long: bash tests/run.sh faults")
GRACE = 30  # seconds that torchrun gives between SIGTERM and SIGKILL
# Slow enough to be met while it answers.
ENVIRONMENT = """
import asyncio


async def step(state, action, extra_info):
    await asyncio.sleep(0.3)
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""
SETTINGS = {"trainer__n_epochs": 4, "trainer__save_freq": 1, "trainer__load_ckpt_from": "latest"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    (files / "slow.py").write_text(ENVIRONMENT)
    return files


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    Run(files, "spo", folder, 2, **settings(files)).finish()
    return folder


def settings(files):
    return SETTINGS | {"rollout__env_path": files / "slow.py"}


class Torchrun:
    """A run as a user starts it; `processes` are its ranks, in order."""

    def __init__(self, files, folder, *flags):
        lines = overrides(files, "spo", folder, **settings(files))
        self.log = folder.parent / "torchrun.log"
        self.agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             *flags, "-m", "RL2.trainer.spo", *lines],
            env=environ(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"), stderr=self.log.open("w"),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.folder = folder

    def wait_for(self, step, timeout=120):
        end = time.monotonic() + timeout
        while not (self.folder / f"checkpoints/step{step:06d}").exists():
            assert self.agent.poll() is None and time.monotonic() < end, self.output()
            time.sleep(0.02)
        ranks = psutil.Process(self.agent.pid).children()
        return sorted(ranks, key=lambda process: int(process.environ()["RANK"]))

    def output(self):
        return self.log.read_text()


def gone(processes, timeout):
    """Whether all of them, and all that they have started, end in time."""
    return not psutil.wait_procs(processes, timeout=timeout)[1]


def family(processes):
    return [*processes, *(child for each in processes for child in each.children(recursive=True))]


def assert_goes_on(files, folder, whole):
    assert all(damage(path) is None for path in Checkpoints(folder).steps())
    Run(files, "spo", folder, 2, **settings(files)).finish()
    rows, others = rows_of(folder), rows_of(whole)
    assert [lasting(row) for row in rows] == [lasting(row) for row in others]


def test_ranks_stop_and_save_when_the_launcher_is_killed(files, whole, tmp_path):
    run = Torchrun(files, tmp_path / "run")
    everybody = family(run.wait_for(2))
    run.agent.send_signal(signal.SIGKILL)
    run.agent.wait()
    assert gone(everybody, GRACE), run.output()
    assert "asked to stop" in run.output()
    assert_goes_on(files, tmp_path / "run", whole)


@pytest.mark.parametrize("seconds", [n / 10 for n in (range(20) if LONG else (0, 7))])
def test_ranks_that_are_being_set_up_end_when_the_launcher_is_killed(files, tmp_path, seconds):
    """Long before there is anything that could be saved; they would wait for its store. At once:
    before they know whose children they are."""
    run = Torchrun(files, tmp_path / "run")
    agent, end = psutil.Process(run.agent.pid), time.monotonic() + 60
    while not (ranks := agent.children()):
        assert time.monotonic() < end, run.output()
        time.sleep(0.01)
    time.sleep(seconds)
    run.agent.send_signal(signal.SIGKILL)
    run.agent.wait()
    assert gone(ranks, 2 * GRACE), run.output()
    assert not (run.folder / "final").exists()  # nor have they trained on, and ended by that


@long
@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_when_one_rank_is_killed(files, whole, tmp_path, victim):
    run = Torchrun(files, tmp_path / "run")
    ranks = run.wait_for(2)
    everybody = family(ranks)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    assert run.agent.wait(GRACE + 30) != 0
    assert gone(everybody, GRACE), run.output()
    assert_goes_on(files, tmp_path / "run", whole)


@long
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_the_ranks_again(files, whole, tmp_path, victim):
    run = Torchrun(files, tmp_path / "run", "--max-restarts=2")
    for step in (2, 5):
        os.kill(run.wait_for(step)[victim].pid, signal.SIGKILL)
        time.sleep(1)
    assert run.agent.wait(300) == 0, run.output()
    rows, others = rows_of(tmp_path / "run"), rows_of(whole)
    assert [lasting(row) for row in rows] == [lasting(row) for row in others]
