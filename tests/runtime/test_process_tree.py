"""Whatever an environment starts, in whatever way, is gone with the process that has started it."""

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from RL2.environments.environment import load_environment
from RL2.runtime.errors import ConfigError, EnvError
from RL2.runtime.process_tree import descendants, kill_below, reap_each
from tests.rollout.support import running, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc (Linux)")

# Gets out of its process group in every way that there is, and goes on when all are there. All
# processes have the folder of this file in their command lines.
ENVIRONMENT = """
import asyncio, os, signal, subprocess, time

HERE = os.path.dirname(__file__)
# A shell with a child that both ignore what asks them to end.
SHELL = f"trap '' TERM HUP; : >{HERE}/begun-$0; {HERE}/sleep 1000; :"
WAYS = {
    "group": "sh -c \\"$0\\" group {here} & :",
    "session": "setsid sh -c \\"$0\\" session {here} & :",
    "orphan": "(setsid sh -c \\"$0\\" orphan {here} &) & :",
    "bare": "(env -i setsid /bin/sh -c \\"$0\\" bare {here} &) & :",
    "nohup": "nohup setsid sh -c 'sh -c \\"$0\\" nohup {here} & exit' \\"$0\\" >/dev/null 2>&1 & :",
}

def daemon():
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    open(f"{HERE}/begun-daemon", "w").close()
    for number in range(64):
        try: os.close(number)
        except OSError: pass
    time.sleep(1000)

async def step(state, action, extra_info):
    for way in WAYS.values():
        subprocess.run(["sh", "-c", way.format(here=HERE), SHELL], check=True)
    daemon()
    while not all(os.path.exists(f"{HERE}/begun-{name}") for name in (*WAYS, "daemon")):
        await asyncio.sleep(0.01)
    END
    return {"reward": 1, "score": os.getppid(), "done": True}
"""


@pytest.fixture
def folder(tmp_path):
    os.symlink(shutil.which("sleep"), tmp_path / "sleep")
    return tmp_path


def environment(folder, body, timeout=60.0):
    path = folder / "env.py"
    path.write_text(body)
    return load_environment(path, timeout, 1)


def play(folder, body, do, timeout=60.0):
    async def run():
        env = environment(folder, body, timeout)
        try:
            return await do(env)
        finally:
            await env.close()

    result = asyncio.run(run())
    assert not running(folder)
    return result


# What becomes of the process that started them, and whether its call has an answer.
ENDS = {
    "goes on": ("pass", True),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", False),
    "ends": ("os._exit(0)", False),
    "hangs": ("time.sleep(1000)", False),
    "stops its guard": ("os.kill(os.getppid(), signal.SIGSTOP)", True),
}


@pytest.mark.parametrize("kind", ENDS)
def test_what_an_environment_starts_ends_with_its_process(folder, kind):
    """Not only with the run."""
    does, answers = ENDS[kind]

    async def do(env):
        if answers:
            assert (await env.step("", "", {})).reward == 1.0
            wait_until(lambda: len(running(folder)) >= 12)  # a process in exec has no name
            return
        with pytest.raises(EnvError, match="process"):
            await env.step("", "", {})
        assert not running(folder)

    play(folder, ENVIRONMENT.replace("END", does), do, timeout=1.0 if kind == "hangs" else 60.0)


def test_nothing_outlives_a_trainer_that_is_killed(folder):
    """Where a fork of the trainer lives on, with all that was open, as well."""
    body = ENVIRONMENT.replace("END", "await asyncio.sleep(1000)")
    trainer = os.fork()
    if trainer == 0:
        try:
            env = environment(folder, body)
            if os.fork() == 0:
                (folder / "fork").write_text(str(os.getpid()))
                time.sleep(1000)
            asyncio.run(env.step("", "", {}))
        finally:
            os._exit(1)
    wait_until(lambda: len(list(folder.glob("begun-*"))) == 6)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    try:
        wait_until(lambda: not running(folder))
    finally:
        os.kill(int((folder / "fork").read_text()), signal.SIGKILL)


def test_what_a_file_starts_when_it_is_imported_ends_with_it(folder):
    body = """
import os, subprocess
subprocess.run(["sh", "-c", f"(setsid {os.path.dirname(__file__)}/sleep 1000 &) & :"])
raise ValueError("no")
"""
    with pytest.raises(ConfigError, match="ValueError: no"):
        environment(folder, body)
    assert not running(folder)


def test_a_limit_of_files_is_no_traceback(folder):
    """Neither at the start, nor in the midst of a run, where it costs the call."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    body = "async def step(s, a, e): return {'reward': 1, 'score': 1, 'done': True}"

    @contextmanager
    def no_more():
        (free := os.dup(0), os.close(free))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    async def do(env):
        assert (await env.step("", "", {}, key=0)).reward == 1.0
        with no_more(), pytest.raises(EnvError, match="no process can be started .*Too many open"):
            await env.step("", "", {}, key=1)
        return await env.step("", "", {}, key=1)

    path = folder / "env.py"
    path.write_text(body)

    async def run():
        env = load_environment(path, 60.0, 2)
        try:
            return await do(env)
        finally:
            await env.close()

    assert asyncio.run(run()).reward == 1.0
    with no_more(), pytest.raises(ConfigError, match="no process can be started"):
        load_environment(path, 60.0, 1)


def test_whoever_multiplies_is_outrun(folder):
    body = """
import asyncio, os, subprocess, sys
MANY = '''
import os
for _ in range(3000):
    if os.fork():
        os._exit(0)
    os.setsid()
'''
async def step(state, action, extra_info):
    for _ in range(3):
        subprocess.Popen([sys.executable, "-S", "-c", MANY, __file__])
    await asyncio.sleep(0.2)
    return {"reward": 1, "score": 1, "done": True}
"""

    async def do(env):
        await env.step("", "", {})
        assert running(folder)

    play(folder, body, do)


def test_those_that_have_ended_are_no_zombies(folder):
    body = """
import os
async def step(state, action, extra_info):
    for _ in range(9):
        os.system("(setsid true &) & :")
    return {"reward": 1, "score": os.getppid(), "done": True}
"""

    async def do(env):
        guard = int((await env.step("", "", {})).score)
        await asyncio.to_thread(wait_until, lambda: len(descendants(guard)) == 1)

    play(folder, body, do)


def test_whoever_is_spared_is_left_alone(folder):
    """And with it all below."""
    shell = ["sh", "-c", f"{folder}/sleep 1000; :"]
    left, killed = (subprocess.Popen(shell, start_new_session=True) for _ in range(2))
    try:
        wait_until(lambda: len(running(folder)) == 4)
        spared = {*descendants(os.getpid())} - {killed.pid, *descendants(killed.pid)}
        assert kill_below(os.getpid(), reap_each, 10, spared)
        assert left.poll() is None and killed.poll() is not None
        assert sorted(running(folder)) == sorted([left.pid, *descendants(left.pid)])
    finally:
        os.killpg(left.pid, signal.SIGKILL)
        left.wait()
