"""Ranks that come, do not come, or cannot be reached."""

import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from RL2.config import ConfigError, TrainingError
from RL2.distributed import rendezvous
from RL2.distributed.rendezvous import Rank, _problem, find_store, meet


@pytest.fixture
def store():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


def together(store, nodes, monkeypatch):
    """What each of several ranks gets, or the error that it gets."""
    got = {}

    def come(rank):
        try:
            got[rank] = meet(store.clone(), rank, len(nodes), wait=20)
        except ConfigError as error:
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
    assert got[0] == got[1] == [Rank(host, "0"), Rank(host, "1")]


def test_who_cannot_be_reached_is_told_to_all(store, monkeypatch):
    got = together(store, [("0", None), ("1", "no way"), ("1", None)], monkeypatch)
    assert [str(got[rank]) for rank in range(3)] == ["no way"] * 3


def test_on_one_machine_loopback_is_fine(store, monkeypatch):
    got = together(store, [("0", "loopback"), ("0", "loopback")], monkeypatch)
    assert len(got[0]) == len(got[1]) == 2


def test_who_does_not_come_is_named(store):
    with pytest.raises(TrainingError, match=r"ranks 0, 2 of 3 did not come in 0.2 s"):
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
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth99")
    assert _problem(0, "localhost").startswith(
        "GLOO_SOCKET_IFNAME=lo,eth99 of rank 0 on localhost: th"
    )


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(rendezvous, "WAIT", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: nobody listens there after"):
        find_store()
