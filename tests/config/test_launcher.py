"""Places that cannot be are told in one line, before anybody waits."""

import os
import socket

import pytest

from RL2.config import ConfigError
from RL2.config.launcher import check_launch_variables

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
        ({"RANK": "5"}, "RANK=5: must be at most 1 with WORLD_SIZE=2; "),
        ({"RANK": "2"}, "RANK=2: must be at most 1 with WORLD_SIZE=2; "),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: must be at most 1 with LOCAL_WORLD_SIZE=2; "),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4: must be at most 2 with WORLD_SIZE=2; "),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x: must be a whole number from 1 to 65535; "),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: must be a whole number from 1 to 65535; "),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be a whole number from 1 to 65535; "),
        ({"MASTER_ADDR": "no such.invalid"}, "MASTER_ADDR=no such.invalid: no machine of that "),
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
    "name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
)
def test_one_of_several_does_not_train_alone(name):
    assert message({name: "2"}).startswith(f"{name}=2 without RANK: ")


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
