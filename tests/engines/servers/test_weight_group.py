"""A trainer and a server that share a process group: two gloo processes.

What is not shown: nccl, and two machines.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from RL2.engines.servers.addresses import free_port
from RL2.engines.servers.weight_group import WeightGroup
from RL2.runtime.errors import EngineError

# The server's side as SGLang has it: what `init_process_group` does inside, in a process that may
# have a default group of its own.
PEER = """
import sys, torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
port, count = int(sys.argv[1]), int(sys.argv[2])
store, rank, size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 1, 2))
group, _ = c10d._new_process_group_helper(
    size, rank, [], c10d.Backend("gloo"), dist.PrefixStore("rl2-test", store),
    group_name="rl2-test", timeout=c10d.default_pg_timeout)
c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
for _ in range(count):
    tensor = torch.empty(5, dtype=torch.bfloat16)
    dist.broadcast(tensor, src=0, group=group)
    print(tensor.tolist(), flush=True)
"""


@pytest.fixture
def peer():
    started = []

    def start(port, count):
        command = [sys.executable, "-c", PEER, str(port), str(count)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def listening():
    """Addresses and ports on which this process listens, as /proc writes them."""
    own = {link.readlink().as_posix() for link in Path("/proc/self/fd").iterdir() if _is_link(link)}
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


def _is_link(path):
    try:
        path.readlink()
    except OSError:
        return False
    return True


def test_broadcasts_arrive_and_nothing_listens_beyond_loopback(peer):
    before = set(listening())
    port = free_port()
    process = peer(port, 2)
    group = WeightGroup("127.0.0.1", port, 2, "rl2-test", "gloo", timeout=60)
    opened = set(listening()) - before
    assert port in {number for _, number in opened}
    assert {address for address, _ in opened} == {"0100007F"}  # 127.0.0.1
    for scale in (1.0, 2.0):
        group.broadcast(torch.arange(5, dtype=torch.bfloat16) * scale)
    out, _ = process.communicate(timeout=60)
    assert out.split("\n")[:2] == ["[0.0, 1.0, 2.0, 3.0, 4.0]", "[0.0, 2.0, 4.0, 6.0, 8.0]"]
    group.close()
    group.close()
    with pytest.raises(EngineError, match="after close"):
        group.broadcast(torch.zeros(1))
    with socket.socket() as probe:  # the port is free again
        probe.bind(("127.0.0.1", port))


def test_nobody_joins():
    start = time.monotonic()
    with pytest.raises(EngineError, match="the 1 others did not join in 2 s"):
        WeightGroup("127.0.0.1", free_port(), 2, "alone", "gloo", timeout=2)
    assert time.monotonic() - start < 30


def test_a_peer_that_is_gone(peer):
    port = free_port()
    process = peer(port, 1)
    group = WeightGroup("127.0.0.1", port, 2, "rl2-test", "gloo", timeout=10)
    process.kill()
    process.wait()
    with pytest.raises(EngineError, match="broadcast failed"):
        for _ in range(3):  # the first may still fit into the connection's buffer
            group.broadcast(torch.zeros(1_000_000))
    group.close()


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineError, match="weight group g .*did not join"):
            WeightGroup("127.0.0.1", taken.getsockname()[1], 2, "g", "gloo", timeout=2)


def test_an_unknown_backend():
    with pytest.raises(EngineError, match="backend=mpi: use one of gloo, nccl"):
        WeightGroup("127.0.0.1", free_port(), 2, "g", "mpi")
