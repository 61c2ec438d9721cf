"""Two machines, played by two network namespaces that a cable joins, and what happens to it."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.support import LONG, Run, assert_nothing_half, assert_same_run
from tests.trainer.support import environ, overrides, write_files

ADDRESSES = ("10.203.7.1", "10.203.7.2")
SILENCE = 8  # seconds until a rank is lost
ENVIRONMENT = """
import asyncio
import os


async def step(state, action, extra_info):
    await asyncio.sleep(float(os.environ.get("SLOW", "0")))
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


class Machines:
    """Two network namespaces, `link` the cable's name in each."""

    def __init__(self):
        self.names = [f"rl2-{os.getpid()}-{i}" for i in range(2)]
        self.links = [f"rl2v{os.getpid() % 100_000}{i}" for i in range(2)]

    def open(self):
        for name in self.names:
            ip("netns", "add", name)
        one, other = self.links
        ip("link", "add", one, "type", "veth", "peer", "name", other)
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for each in ("lo", link):
                ip("-n", name, "link", "set", each, "up")

    def cut(self):
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def close(self):
        for name in self.names:
            ip("netns", "del", name, check=False)


@pytest.fixture(scope="module")
def machines():
    machines = Machines()
    try:
        machines.open()
    except (OSError, subprocess.CalledProcessError) as error:
        machines.close()
        said = getattr(error, "stderr", None) or error
        pytest.skip(f"network namespaces are not permitted here: {said}")
    yield machines
    machines.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    (files / "slow.py").write_text(ENVIRONMENT)
    return files


def settings(files):
    return {
        "rollout__env_path": files / "slow.py", "trainer__save_freq": 1, "trainer__n_epochs": 2,
        "trainer__rank_timeout": SILENCE, "trainer__load_ckpt_from": "latest",
        "rollout__env_workers": 1,
    }  # fmt: skip


class TwoTorchruns:
    """A run on both machines."""

    def __init__(self, machines, files, folder, **variables):
        self.folder = folder
        self.logs = [folder.parent / f"{folder.name}.{i}.log" for i in range(2)]
        self.agents = []
        for i, (name, link, log) in enumerate(
            zip(machines.names, machines.links, self.logs, strict=True)
        ):
            command = [
                "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
                "--nnodes=2", "--nproc-per-node=1", f"--node-rank={i}",
                f"--master-addr={ADDRESSES[0]}", "--master-port=29511",
                "-m", "RL2.trainer.spo", *overrides(files, "spo", folder, **settings(files)),
            ]  # fmt: skip
            environment = environ(**{"GLOO_SOCKET_IFNAME": link} | variables)
            if not environment["GLOO_SOCKET_IFNAME"]:
                del environment["GLOO_SOCKET_IFNAME"]
            with log.open("w") as file:
                self.agents.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdout=file,
                        stderr=file,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )  # fmt: skip
                )

    def wait(self, seconds):
        end = time.monotonic() + seconds
        try:
            return [agent.wait(max(0.1, end - time.monotonic())) for agent in self.agents]
        except subprocess.TimeoutExpired:
            pytest.fail(f"both sides end within {seconds} s; they said:\n{self.output()}")
        finally:
            for agent in self.agents:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(agent.pid, 9)

    def wait_for(self, step, seconds=200):
        end = time.monotonic() + seconds
        while not (self.folder / f"checkpoints/step{step:06d}").exists():
            running = all(agent.poll() is None for agent in self.agents)
            assert running and time.monotonic() < end, self.output()
            time.sleep(0.05)

    def output(self):
        return "\n".join(log.read_text() for log in self.logs)


def test_a_cable_is_cut(machines, files, tmp_path):
    """Both sides end, and say who was lost and where they stood; then the run goes on."""
    run = TwoTorchruns(machines, files, tmp_path / "run", SLOW="0.2")
    try:
        run.wait_for(2)
        machines.cut()
        statuses = run.wait(SILENCE + 100)
    finally:
        ip("-n", machines.names[1], "link", "set", machines.links[1], "up")
    assert all(status != 0 for status in statuses), run.output()
    for own, log in enumerate(run.logs):
        said = [line for line in log.read_text().splitlines() if "no sign of life" in line]
        assert len(said) == 1, log.read_text()
        assert f"TrainingError: no sign of life from rank {1 - own} on " in said[0]
        assert f"rank {own} on " in said[0] and " of step " in said[0] and ".py:" in said[0]
    assert_nothing_half(run.folder)
    assert not (run.folder / "final").exists()
    whole = tmp_path / "whole"
    for folder in (run.folder, whole):  # on one machine, as that is quicker
        Run(files, "spo", folder, 2, **settings(files)).finish()
    assert_same_run(run.folder, whole)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_is_gone(files, tmp_path, monkeypatch, number, victim):
    """The other one ends by itself, as no torchrun ends it, and says who was lost."""
    if not LONG and (number == signal.SIGKILL) == (victim == 0):
        pytest.skip("long: bash tests/run.sh faults")
    monkeypatch.setenv("SLOW", "0.2")
    run = Run(files, "spo", tmp_path / "run", 2, **settings(files) | {"trainer__rank_timeout": 3})
    end = time.monotonic() + 100
    while not (run.folder / "checkpoints/step000001").exists():
        assert run.is_alive() and time.monotonic() < end, run.output()
        time.sleep(0.02)
    gone, left = run.ranks[victim], run.ranks[1 - victim]
    os.kill(gone.pid, number)
    left.join(60)
    code = left.exitcode
    run.kill()
    assert code == 1, run.output()
    words = "no sign of life from" if number == signal.SIGSTOP else "lost another rank while it was"
    assert words in run.output() and f"rank {1 - victim} on " in run.output()


def test_a_name_that_is_loopback(machines, files, tmp_path):
    """gloo would tell the other machine to look for us on its own loopback."""
    run = TwoTorchruns(machines, files, tmp_path / "run", GLOO_SOCKET_IFNAME="")
    statuses = run.wait(120)
    assert all(status != 0 for status in statuses)
    said = [line for line in run.output().splitlines() if "ConfigError: " in line]
    assert said and all("GLOO_SOCKET_IFNAME of rank 0 on " in line for line in said), run.output()
    assert all(machines.links[0] in line for line in said)  # what to set it to


@pytest.mark.skipif(not LONG, reason="long: bash tests/run.sh faults")
def test_a_cable_that_is_back_in_time(machines, files, tmp_path):
    run = TwoTorchruns(machines, files, tmp_path / "run", SLOW="0.2")
    run.wait_for(2)
    machines.cut()
    time.sleep(SILENCE / 2)
    ip("-n", machines.names[1], "link", "set", machines.links[1], "up")
    assert run.wait(250) == [0, 0], run.output()


@pytest.mark.skipif(not LONG, reason="long: bash tests/run.sh faults")
def test_a_long_rollout_is_no_silence(machines, files, tmp_path):
    run = TwoTorchruns(machines, files, tmp_path / "run", SLOW=str(2 * SILENCE))
    run.wait_for(1)
    for agent in run.agents:
        agent.terminate()
    run.wait(60)
    assert "no sign of life" not in run.output()
