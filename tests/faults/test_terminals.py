"""Terminals that close, fill up or are not read: the run goes on, or saves and ends."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.support import LONG, assert_nothing_half, assert_same_run
from tests.trainer.support import command, environ, overrides, write_files

# Prints, and has others print, in the midst of what it does.
ENVIRONMENT = """
import asyncio
import os
import subprocess
import sys


async def step(state, action, extra_info):
    print("judged", action)
    print("\\ud800" * 9999, file=sys.stderr, flush=True)
    subprocess.run(["sh", "-c", "echo from a child"], check=os.environ.get("STRICT") == "1")
    await asyncio.sleep(float(os.environ.get("SLOW", "0")))
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""
LOSS = """
import sys


def nll(logps):
    print("in the loss")
    print("in the loss", file=sys.stderr)
    return -logps
"""
SETTINGS = {"trainer__max_steps": 2, "test_data__max_examples": 4, "trainer__test_freq": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    (files / "loud.py").write_text(ENVIRONMENT)
    (files / "loss.py").write_text(LOSS)
    return files


def lines(files, folder, **changes):
    changes = SETTINGS | {
        "rollout__env_path": files / "loud.py", "test_data__path": files / "rows.jsonl",
        "actor__loss__import_path": f"{files / 'loss.py'}:nll", "rollout__env_workers": 1,
    } | changes  # fmt: skip
    return overrides(files, "spo", folder, **changes)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = command("spo", lines(files, folder))
    assert done.returncode == 0 and "from a child" in done.stdout, done.stderr
    return folder


# What is redirected, whether the environment's children must be able to write, and its processes.
REDIRECTIONS = {
    "head": ("2>&1 | head -c 5; exit ${PIPESTATUS[0]}", "1", 1),
    "full": (">/dev/full 2>&1", "0", 1),
    "full, in process": (">/dev/full 2>&1", "0", 0),
    "closed": (">&- 2>&-", "1", 1),
}


@pytest.mark.parametrize("kind", REDIRECTIONS if LONG else ["head", "full, in process"])
def test_nobody_reads(files, whole, tmp_path, kind):
    redirection, strict, n_workers = REDIRECTIONS[kind]
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "RL2.trainer.spo"]
    words += lines(files, folder, rollout__env_workers=n_workers)
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *words], env=environ(STRICT=strict),
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize("ignored", [False, True] if LONG else [False])
@pytest.mark.parametrize("n_processes", [0, 2] if LONG else [2])
def test_a_terminal_closes(files, whole, tmp_path, n_processes, ignored):
    """Its session gets SIGHUP, and whoever writes to it EIO. `nohup` has a run go on."""
    folder = tmp_path / "run"
    start = [sys.executable, "-m"]
    if n_processes:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
        start += ["--signals-to-handle=SIGTERM,SIGINT"] * ignored + ["-m"]
    words = [*start, "RL2.trainer.spo"]
    words += lines(files, folder, trainer__load_ckpt_from="latest", trainer__max_steps=6)
    pid, terminal = pty.fork()
    if pid == 0:
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execvpe(words[0], words, environ(SLOW="0.3", STRICT="1"))
    end = time.monotonic() + 120
    os.set_blocking(terminal, False)
    said = b""
    while not (folder / "rollouts/step000001_train.jsonl").exists():
        said += _read(terminal)
        assert time.monotonic() < end, said
        time.sleep(0.02)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    status = os.waitstatus_to_exitcode(status)
    if ignored:
        assert status == 0 and (folder / "final").exists()
        return
    # torchrun may go before it has seen how its processes ended.
    assert status in ((1, -signal.SIGHUP) if n_processes else (128 + signal.SIGHUP,))
    end = time.monotonic() + 40
    while not list((folder / "checkpoints").glob("step*")):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert_nothing_half(folder)
    assert not (folder / "final").exists()


def _read(terminal):
    try:
        return os.read(terminal, 2**16)
    except BlockingIOError:
        return b""
