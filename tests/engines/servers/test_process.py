"""Processes of ours end with us, however we end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from RL2.engines.servers.addresses import free_port
from RL2.engines.servers.http import Server
from RL2.engines.servers.process import ServerProcess, wait_until_healthy
from RL2.runtime.errors import EngineError

SCRIPTED = str(Path(__file__).with_name("scripted_server.py"))
# A server with a child and a grandchild in a session of its own that ignores SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import os,signal,subprocess,sys,time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
child += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
child += " start_new_session=True);"
child += "open(sys.argv[1], 'a').write(f'{os.getpid()} {p.pid} '); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], start_new_session=True)
open(sys.argv[1], "a").write(f"{os.getpid()} ")
time.sleep(600)
"""
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from RL2.engines.servers.process import ServerProcess
from RL2.engines.servers.weights import HostWeights
import torch
weights = HostWeights()
weights.fill([("w", torch.ones(3))], 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print(weights.folder, flush=True)
process = ServerProcess([sys.executable, "-c", sys.argv[1], sys.argv[2]], {}, Path(sys.argv[3]))
print(process.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def family(path: Path) -> list[int]:
    wait_for(lambda: path.exists() and len(path.read_text().split()) == 3)
    return [int(pid) for pid in path.read_text().split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc (Linux)")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_trainer_is_killed(tmp_path, number):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, FAMILY, str(tmp_path / "pids"), str(tmp_path / "log")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    weights = Path(trainer.stdout.readline().strip())
    guard = int(trainer.stdout.readline())
    pids = family(tmp_path / "pids")
    assert all(map(alive, [guard, *pids]))
    assert weights.is_dir()
    trainer.send_signal(number)
    trainer.wait(timeout=60)
    trainer.stdout.close()
    wait_for(lambda: not any(map(alive, [guard, *pids])))
    assert not weights.exists()


@needs_proc
def test_stop_ends_the_whole_family(tmp_path):
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "pids")]
    process = ServerProcess(command, {}, tmp_path / "log")
    pids = family(tmp_path / "pids")
    asyncio.run(process.stop())
    assert process.status is not None
    assert not any(map(alive, pids))


@needs_proc
def test_a_server_that_dies_takes_its_children_along(tmp_path):
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "pids")]
    process = ServerProcess(command, {}, tmp_path / "log")
    pids = family(tmp_path / "pids")
    os.kill(next(p for p in pids if parent_of(p) == process.pid), signal.SIGKILL)
    wait_for(lambda: process.status is not None)
    assert process.status == 128 + signal.SIGKILL
    assert not any(map(alive, pids))


@needs_proc
def test_a_killed_guard_takes_the_server_along(tmp_path):
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "pids")]
    process = ServerProcess(command, {}, tmp_path / "log")
    pids = family(tmp_path / "pids")
    server = next(p for p in pids if parent_of(p) == process.pid)
    os.kill(process.pid, signal.SIGKILL)
    try:
        wait_for(lambda: not alive(server))
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_servers_environment_is_not_a_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    show = "import os; print(sorted(k for k in os.environ if k in ('RANK', 'KEY') or 'ELAST' in k))"
    process = ServerProcess([sys.executable, "-c", show], {"KEY": "1"}, tmp_path / "log")
    wait_for(lambda: process.status is not None)
    assert process.status == 0
    assert "['KEY']" in (tmp_path / "log").read_text()


def test_a_server_that_cannot_start_is_shown_with_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    process = ServerProcess(command, {}, tmp_path / "log")
    server = Server(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineError, match="(?s)server 0 ended with status 3.*no such model"):
        asyncio.run(wait_until_healthy(server, process, "/health", "server 0", 60))


def test_a_server_that_says_nothing_is_one_line(tmp_path):
    process = ServerProcess([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "log")
    server = Server(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineError) as caught:
        asyncio.run(wait_until_healthy(server, process, "/health", "server 0", 60))
    problem = "server 0 ended with status 3 while it started"
    assert str(caught.value) == f"{problem}; {tmp_path / 'log'} is empty"


def test_a_server_that_takes_too_long_names_the_key(tmp_path):
    process = ServerProcess([sys.executable, "-c", "import time; time.sleep(60)"], {},
                            tmp_path / "log")  # fmt: skip

    async def run():
        server = Server(f"http://127.0.0.1:{free_port()}")
        try:
            await wait_until_healthy(server, process, "/health", "server 0", 0.5)
        finally:
            await server.close()
            await process.stop()

    with pytest.raises(EngineError, match=r"not ready after 0.5 s \(rollout.server_start_timeout"):
        asyncio.run(run())


def test_the_guard_needs_only_the_standard_library():
    source = """
import runpy, sys
sys.argv = ["RL2/runtime/guard.py", "0", sys.executable, "-c", "pass"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
assert not {"RL2", "torch"} & {name.partition(".")[0] for name in sys.modules}
"""
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-I", "-c", source], cwd=root, check=True)
