"""Places that cannot be are told in one line, before anybody waits."""

import os
import socket
import sys

import pytest

from RL2.config import launcher
from RL2.config.launcher import check_gpu, check_launch_variables
from RL2.runtime.errors import ConfigError

PLACE = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def message(environ):
    with pytest.raises(ConfigError) as caught:
        check_launch_variables(environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        PLACE,
        {"WORLD_SIZE": "1"},
        {"MASTER_PORT": "29500"},
        {name: PLACE[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")},
        PLACE | {"RANK": "5", "WORLD_SIZE": "6"},
        PLACE | {"MASTER_ADDR": "localhost"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2"} | PLACE,
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of a job, one process
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_places_that_can_be(environ):
    check_launch_variables(environ)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number from 1 on; "),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: must be a whole number from 1 on; "),
        ({"RANK": "-1"}, "RANK=-1: must be a whole number from 0 on; "),
        ({"RANK": ""}, "RANK=: must be a whole number from 0 on; "),
        ({"RANK": "9" * 5000}, "RANK=9"),
        # Who looks for rank "0" finds none, and waits.
        ({"RANK": "00"}, "RANK=00: must be a whole number from 0 on; "),
        ({"WORLD_SIZE": "02"}, "WORLD_SIZE=02: must be a whole number from 1 on; "),
        ({"RANK": "5"}, "RANK=5: must be at most 1 with WORLD_SIZE=2; "),
        ({"RANK": "2"}, "RANK=2: must be at most 1 with WORLD_SIZE=2; "),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: must be at most 1 with LOCAL_WORLD_SIZE=2; "),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4: must be at most 2 with WORLD_SIZE=2; "),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x: must be a whole number from 1 to 65535; "),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: must be a whole number from 1 to 65535; "),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be a whole number from 1 to 65535; "),
        ({"MASTER_ADDR": "no such.invalid"}, "MASTER_ADDR=no such.invalid: no machine of that "),
        ({"MASTER_ADDR": "a..b"}, "MASTER_ADDR=a..b: no machine of that name is known here ("),
        ({"MASTER_ADDR": "a" * 99}, "MASTER_ADDR=aaaa"),
        ({"MASTER_ADDR": ""}, "RANK=1 without MASTER_ADDR: start it with torchrun"),
    ],
)
def test_places_that_cannot_be(changes, expected):
    assert message(PLACE | changes).startswith(expected)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_needs_to_know_the_others(name):
    assert message({k: v for k, v in PLACE.items() if k != name}).startswith(
        f"RANK=1 without {name}: "
    )


@pytest.mark.parametrize(
    "name",
    ["WORLD_SIZE", "LOCAL_WORLD_SIZE", *launcher._OTHER_LAUNCHERS],
)
def test_one_of_several_does_not_train_alone(name):
    assert message({name: "2"}).startswith(f"{name}=2 without RANK: ")


def test_more_processes_than_gpus():
    check_gpu(1, {})
    check_gpu(2, {"LOCAL_RANK": "1"})
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=1: uses the GPU .* but this machine has 1 "):
        check_gpu(1, {"LOCAL_RANK": "1"})


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = PLACE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}
        assert message(place).startswith(f"MASTER_PORT={port}: rank 0 cannot listen there (in use)")
        check_launch_variables(place | {"RANK": "1"})  # who does not listen
        check_launch_variables(place | {"TORCHELASTIC_USE_AGENT_STORE": "True"})  # torchrun does
    check_launch_variables(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen anywhere")
def test_a_port_that_only_root_may_have():
    place = PLACE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "80"}
    assert "rank 0 cannot listen there (Permission denied)" in message(place)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", socket.gethostname()])
def test_rank_0_finds_itself(address):
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    place = PLACE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port, "MASTER_ADDR": address}
    check_launch_variables(place)
    check_launch_variables(place)  # and the port is free again


@pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is this machine on Linux")
def test_somebody_else_answers_at_the_address_of_rank_0(monkeypatch):
    """Rank 0 listens at all its addresses; one of them is taken by another process."""
    monkeypatch.setattr(launcher, "_REACH_TIMEOUT", 0.5)
    with socket.socket() as own, socket.socket() as other:
        other.bind(("127.0.0.5", 0))
        other.listen()
        address, port = other.getsockname()
        own.bind(("127.0.0.6", 0))
        own.listen()
        with pytest.raises(ConfigError) as caught:
            launcher._check_reached(own, address, port)
    assert str(caught.value).startswith(
        f"MASTER_ADDR={address}: rank 0 listens at port {port}, but is not reached at that address "
        "(another process answers); give "
    )


def test_nobody_answers_at_the_address_of_rank_0(monkeypatch):
    """192.0.2.0/24 is for examples; no machine has such an address."""
    monkeypatch.setattr(launcher, "_REACH_TIMEOUT", 0.5)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    place = PLACE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}
    text = message(place | {"MASTER_ADDR": "192.0.2.77"})
    assert text.startswith(f"MASTER_ADDR=192.0.2.77: rank 0 listens at port {port}, but is not")
