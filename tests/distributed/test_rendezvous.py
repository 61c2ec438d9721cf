"""Ranks that come, do not come, or cannot be reached."""

import itertools
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from RL2.distributed import rendezvous
from RL2.distributed.rendezvous import _problem, find_store, give_up, meet
from RL2.distributed.same_start import Fact
from RL2.runtime.errors import ConfigError, RL2Error, TrainingError


@pytest.fixture
def store():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


def together(store, nodes, monkeypatch, facts=None):
    """What each of several ranks gets, or the error that it gets."""
    got = {}

    def come(rank):
        try:
            own = {} if facts is None else facts[rank]
            got[rank] = meet(store.clone(), rank, len(nodes), own, wait=20)
        except RL2Error as error:
            got[rank] = error

    for rank, (node, problem) in enumerate(nodes):
        monkeypatch.setenv("GROUP_RANK", node)
        monkeypatch.setattr(rendezvous, "_problem", lambda own, host, said=problem: said)
        thread = threading.Thread(target=come, args=(rank,))
        thread.start()
        while not store.check([f"here/{rank}"]):
            pass
    thread.join(20)
    for _ in range(200):
        if len(got) == len(nodes):
            return got
        threading.Event().wait(0.05)
    raise AssertionError(got)


def test_all_know_all(store, monkeypatch):
    got = together(store, [("0", None), ("1", None)], monkeypatch)
    host = socket.gethostname()
    assert got[0] == got[1]
    assert [(rank.host, rank.node) for rank in got[0]] == [(host, "0"), (host, "1")]


def test_who_cannot_be_reached_is_told_to_all(store, monkeypatch):
    got = together(store, [("0", None), ("1", "no way"), ("1", None)], monkeypatch)
    assert [str(got[rank]) for rank in range(3)] == ["no way"] * 3


def test_who_was_started_with_something_else_is_told_to_all(store, monkeypatch):
    one, other = ({"actor.lr": Fact(lr, "start all alike")} for lr in ("0.001", "0.002"))
    got = together(store, [("0", None)] * 3, monkeypatch, [one, one, other])
    host = socket.gethostname()
    line = f"actor.lr: rank 0 on {host} has 0.001, rank 2 on {host} has 0.002; start all alike"
    assert [str(got[rank]) for rank in range(3)] == [line] * 3


def test_who_counts_other_ranks_ends_all(store, monkeypatch):
    """Each would wait for ranks that never come, or train without one."""
    monkeypatch.setattr(rendezvous, "_STAY", 0.3)
    ends = {}

    def come(rank, n_ranks):
        with pytest.raises(RL2Error) as caught:
            meet(store.clone(), rank, n_ranks, wait=20)
        ends[rank] = str(caught.value)

    first = threading.Thread(target=come, args=(0, 3))
    first.start()
    store.get("world_size")
    come(1, 2)
    first.join(20)
    host = socket.gethostname()
    line = f"WORLD_SIZE=2 of rank 1 on {host} and WORLD_SIZE=3 of rank 0 on {host}: must be the"
    assert ends[1].startswith(line) and f"another rank ends: {line}" in ends[0]


def test_two_processes_of_one_rank(store, monkeypatch):
    """The second one would wait for connections that the first has made."""
    monkeypatch.setattr(rendezvous, "_STAY", 0.0)
    meet(store.clone(), 0, 1)
    monkeypatch.setattr(rendezvous.os, "getpid", lambda: 1)
    with pytest.raises(ConfigError, match=r"RANK=0: process 1 on .* and process \d+ on .* both"):
        meet(store.clone(), 0, 1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    meet(store.clone(), 0, 1)  # what is there is of ranks that torchrun has replaced


def test_ranks_look_for_each_other_under_one_name(monkeypatch):
    """Also where some know how many there are on their machine, and others do not; but not those
    that torchrun has started again for those that it has replaced."""
    names = []
    for environ in (
        {},
        {"LOCAL_WORLD_SIZE": "2"},
        {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"},
        {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"},
    ):
        monkeypatch.setattr(rendezvous, "_RUNS", itertools.count())
        monkeypatch.setattr(rendezvous.os, "environ", {"WORLD_SIZE": "2"} | environ)
        names.append(rendezvous.next_prefix())
    assert names == ["run0", "run0", "run0", "run0-1"]


def test_who_gives_up_is_heard_by_those_that_wait(store, monkeypatch):
    """A rank that fails its own checks does not come; the others waited ten minutes for it."""
    for name, value in {
        "RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "next_prefix", lambda: "run0")
    giving_up = threading.Thread(target=give_up, args=("ConfigError: actor.lr=2: must be",))
    start = time.monotonic()
    giving_up.start()
    with pytest.raises(TrainingError) as caught:
        meet(dist.PrefixStore("run0", store.clone()), 0, 2, wait=20)
    giving_up.join(20)
    host = socket.gethostname()
    assert str(caught.value).endswith(f": rank 1 on {host}: ConfigError: actor.lr=2: must be")
    assert time.monotonic() - start < 8  # and it knows that it was heard


def test_the_store_goes_while_ranks_wait():
    class Gone:
        def __getattr__(self, name):
            raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(TrainingError, match=r"rank 1 on .*: the connection to where the ranks mee"):
        meet(Gone(), 1, 2)


def test_on_one_machine_loopback_is_fine(store, monkeypatch):
    got = together(store, [("0", "loopback"), ("0", "loopback")], monkeypatch)
    assert len(got[0]) == len(got[1]) == 2


def test_who_does_not_come_is_named(store):
    with pytest.raises(TrainingError, match=r"ranks 0, 2 of 3 did not start in 0.2 s"):
        meet(store, 1, 3, wait=0.2)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", "GLOO_SOCKET_IFNAME of rank 3 on localhost: the machine's name is 127.0.0.1"),
        (
            "no.such.invalid",
            "GLOO_SOCKET_IFNAME of rank 3 on no.such.invalid: the machine's name is",
        ),
    ],
)
def test_a_name_that_nobody_else_reaches(monkeypatch, host, expected):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    problem = _problem(3, host)
    assert problem.startswith(expected) and "NCCL_SOCKET_IFNAME" in problem


def test_an_interface_that_is_chosen(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert _problem(0, "localhost") is None
    meet(dist.HashStore(), 0, 1)
    for chosen, unknown in (("lo,eth99", "eth99"), ("lo, lo", " lo"), ("lo,", "")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
        line = f"GLOO_SOCKET_IFNAME={chosen} of rank 0 on .*: there is no interface '{unknown}'; "
        with pytest.raises(ConfigError, match=line):  # on a single machine as well
            meet(dist.HashStore(), 0, 1)


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(rendezvous, "WAIT", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: no process listens there after"):
        find_store()
