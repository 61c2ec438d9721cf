"""What a stranger's code starts in the trainer's own process is gone with the run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from RL2.runtime import guard
from RL2.runtime.children import children_end
from RL2.runtime.errors import EnvError
from RL2.runtime.process_tree import descendants, reap_adopted
from tests.rollout.support import running, wait_until
from tests.trainer.support import train, write_env, write_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc (Linux)")


@pytest.fixture
def folder(tmp_path):
    os.symlink(shutil.which("sleep"), tmp_path / "sleep")
    return tmp_path


def start(folder):
    """In the group, in a session, and in a session whose parent is gone."""
    subprocess.Popen([f"{folder}/sleep", "1000"])
    subprocess.Popen([f"{folder}/sleep", "1000"], start_new_session=True)
    os.system(f"(setsid {folder}/sleep 1000 &) & :")
    wait_until(lambda: len(running(folder)) >= 3)


def test_what_the_body_has_started_ends_and_nothing_else(folder, tmp_path_factory, capfd):
    other = tmp_path_factory.mktemp("other")
    os.symlink(shutil.which("sleep"), other / "sleep")
    before = subprocess.Popen([f"{other}/sleep", "1000"])
    command = [sys.executable, "-I", guard.__file__, str(os.getpid()), f"{other}/sleep", "1000"]
    try:
        with pytest.raises(KeyError), children_end(watch=True):
            start(folder)
            guarded = subprocess.Popen(command)
            wait_until(lambda: descendants(guarded.pid))
            raise KeyError
        assert not running(folder)
        assert before.poll() is guarded.poll() is None and len(running(other)) == 3
    finally:
        before.kill()
        before.wait()
    guarded.terminate()
    assert guarded.wait(20) == 0
    assert not running(other)
    assert capfd.readouterr().err == ""


def test_a_process_that_is_killed_is_watched(folder, capfd):
    trainer = os.fork()
    if trainer == 0:
        try:
            with children_end(watch=True):
                start(folder)  # before the watcher is there, perhaps
                time.sleep(4)  # a busy machine starts it late, and it looks every second
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(trainer, 0)
    wait_until(lambda: not running(folder))
    assert "process ended abruptly" in capfd.readouterr().err


def test_a_fork_that_leaves_the_body_ends_nobody(folder):
    fork = None
    try:
        with children_end(watch=False):
            one = subprocess.Popen([f"{folder}/sleep", "1000"])
            if (fork := os.fork()) == 0:
                raise ValueError
            assert os.waitpid(fork, 0)[1] == 0
            assert one.poll() is None
    finally:
        if fork == 0:
            os._exit(0)


def test_only_those_that_were_adopted_are_reaped():
    others = len(descendants(os.getpid()))  # ranks of other tests
    with children_end(watch=False):
        for _ in range(3):
            os.system("setsid sh -c 'true & exit'")
        own = subprocess.Popen(["true"])
        session = subprocess.Popen(["true"], start_new_session=True)
        wait_until(lambda: (reap_adopted(), len(descendants(os.getpid())) == others + 2)[1])
        os.waitid(os.P_PID, own.pid, os.WEXITED | os.WNOWAIT)
        reap_adopted()
        assert own.wait() == session.wait() == 0


ENVIRONMENT = """
import os, subprocess, time
async def step(state, action, extra_info):
    subprocess.Popen([os.path.dirname(__file__) + "/sleep", "1000"], start_new_session=True)
    os.system(f"(setsid {os.path.dirname(__file__)}/sleep 1000 &) & :")
    FOLLOWS
    return {"reward": float(len(action) % 2), "score": 0, "done": True}
"""


# By what follows: processes for the environment, and whether the run fails.
ENDS = {
    "pass": (0, False),
    "1 / 0": (0, True),
    # The guard, which would have ended them.
    "os.kill(os.getppid(), 9); time.sleep(9)": (1, True),
}


@pytest.mark.parametrize("follows", ENDS)
def test_a_run_leaves_nothing_of_an_environment(folder, follows):
    n_workers, fails = ENDS[follows]
    files = write_files(folder)
    write_env(files / "env.py", ENVIRONMENT.replace("FOLLOWS", follows))
    with pytest.raises(EnvError) if fails else nullcontext():
        train(
            files, "spo", folder / "run", rollout__env_workers=n_workers, trainer__max_steps=1,
            train_data__prompts_per_rollout=2,
        )  # fmt: skip
    assert not running(folder)
