"""Whatever happens to wandb, the run does not notice: the same rows, one line that says so, and
nothing left running."""

import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from RL2.runtime.process_tree import descendants
from tests.faults.support import LONG, Run
from tests.trainer.support import lasting, rows_of, write_files

AT_ONCE = 60  # seconds for what takes a few on a quiet machine
FINISH = 60 + 15  # seconds that wandb may take to end, and to be ended

# Waits in its second step until it may go on.
LOSS = """
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


def nll(logps):
    global calls
    calls += len(logps) > 3  # the trial before the run is of so many tokens
    if calls == 2 and (HERE / "wait").exists():
        (HERE / "waits").touch()
        while (HERE / "wait").exists():
            time.sleep(0.01)
    return -logps
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    (files / "loss.py").write_text(LOSS)
    return files


def start(files, folder, use_wandb="true", **environ):
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    environ = {"WANDB_MODE": "offline", "HOME": str(home), "WANDB_CONFIG_DIR": str(home)} | environ
    return Run(
        files, "sft", folder, trainer__use_wandb=use_wandb, environ=environ,
        actor__loss__import_path=f"{files / 'loss.py'}:nll",
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory):
    """The rows of a run without wandb, and its seconds."""
    folder, begin = tmp_path_factory.mktemp("without") / "run", time.monotonic()
    start(files, folder, use_wandb="false").finish()
    return [lasting(row) for row in rows_of(folder)], time.monotonic() - begin


def wait_for(condition, what, seconds=AT_ONCE):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.02)
    return found


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].rpartition(b"/")[2]
    except OSError:
        return b""


def running(pids):
    """Those that have not ended; a zombie has."""
    return [pid for pid in pids if name_of(pid)]


@contextmanager
def held(files, folder, **environ):
    """A run in its second step, with wandb-core beside it; it goes on after the body."""
    (files / "wait").touch()
    try:
        run = start(files, folder, **environ)
        wait_for(lambda: (files / "waits").exists(), "the second step")
        (root,) = (process.pid for process in run.ranks)
        logged = lambda: [*folder.glob("wandb/*run-*/*.wandb")]  # noqa: E731
        wait_for(logged, "a run of wandb")
        yield run, [pid for pid in descendants(root) if name_of(pid) == b"wandb-core"]
    finally:
        for name in ("wait", "waits"):
            (files / name).unlink(missing_ok=True)


def assert_unnoticed(run, expected):
    """The rows, and one line; returns that."""
    assert [lasting(row) for row in rows_of(run.folder)] == expected[0]
    assert "Traceback" not in run.output()
    lines = [line for line in run.output().splitlines() if line.startswith("wandb: ")]
    assert len(lines) == 1, run.output()
    return lines[0]


def test_wandb_is_killed(files, expected, tmp_path):
    with held(files, tmp_path / "run") as (run, core):
        for pid in core:
            os.kill(pid, signal.SIGKILL)
        assert core
    run.finish()
    line = assert_unnoticed(run, expected)
    assert "it gets no more rows" in line and str(run.folder / "metrics.jsonl") in line


def test_a_run_that_is_killed_leaves_no_wandb(files, tmp_path):
    with held(files, tmp_path / "run") as (run, core):
        below = descendants(run.ranks[0].pid)
        assert len(below) >= 3 and set(core) <= set(below)  # guard, sink, wandb-core
        run.kill()
        wait_for(lambda: not running(below), "the end of all that wandb has started")


@pytest.mark.skipif(not LONG, reason="RL2_FAULTS=long")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_its_processes_are_stopped_or_killed(files, expected, tmp_path, number):
    """What is stopped is ended after a time; the sink of ours may be killed as well."""
    with held(files, tmp_path / "run") as (run, core):
        guard, sink, *others = descendants(run.ranks[0].pid)
        for pid in core if number == signal.SIGSTOP else [sink]:
            os.kill(pid, number)
    begin = time.monotonic()
    run.finish()
    assert time.monotonic() - begin < FINISH + AT_ONCE
    line = assert_unnoticed(run, expected)
    assert ("was not done" if number == signal.SIGSTOP else "ended with status") in line
    assert not running([guard, sink, *others])


@contextmanager
def silent():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@contextmanager
def failing():
    """A server that answers 500 to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def absent():
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@pytest.mark.skipif(not LONG, reason="RL2_FAULTS=long")
@pytest.mark.parametrize("server", [absent, silent, failing])
def test_a_server_that_does_not_work(files, expected, tmp_path, server):
    begin = time.monotonic()
    with server() as port:
        run = start(
            files, tmp_path / "run", WANDB_MODE="online", WANDB_API_KEY="a" * 40,
            WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_INIT_TIMEOUT="5",
        )  # fmt: skip
        run.finish()
    assert time.monotonic() - begin < expected[1] + FINISH + AT_ONCE
    line = assert_unnoticed(run, expected)
    assert "logging offline" in line or "was not done" in line
