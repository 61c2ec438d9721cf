"""How the ranks of a run find each other, within bounded time and by name."""

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from ipaddress import ip_address

import torch.distributed as dist

from RL2.config import ConfigError, TrainingError
from RL2.config.errors import first_line
from RL2.config.launcher import hosts_store

logger = logging.getLogger(__name__)

# Seconds for all ranks to come, and to connect. They start together, but one may import for long.
WAIT = 600.0
_SAY_AFTER = 30.0
_POLL = 0.5


@dataclass(frozen=True)
class Rank:
    """What the others are told of a rank. host: its machine's name. node: torchrun's number of the
    machine, empty without torchrun. problem: why the others cannot reach it, None if they can."""

    host: str
    node: str = ""
    problem: str | None = None


def find_store() -> dist.Store:
    """Where the ranks that torchrun or its variables describe meet.

    Raises ConfigError where nobody is there, or rank 0 cannot be.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = hosts_store()
    if not hosts:
        _wait_for_port(address, port)
    try:
        return dist.TCPStore(
            address, port, is_master=hosts, wait_for_workers=False, multi_tenant=hosts,
            timeout=timedelta(seconds=WAIT),
        )  # fmt: skip
    except dist.DistError as error:
        does = "listen" if hosts else "talk to rank 0"
        raise ConfigError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: rank {os.environ['RANK']} cannot {does} "
            f"there ({first_line(error)}); choose another port, or the machine of rank 0"
        ) from error


def meet(store: dist.Store, own: int, n_ranks: int, wait: float = WAIT) -> list[Rank]:
    """All ranks, once all have come. A collective before there are any.

    Raises ConfigError, the same on all ranks, where one cannot be reached, and TrainingError that
    names those which have not come in `wait` seconds.
    """
    host = socket.gethostname()
    told = Rank(host, os.environ.get("GROUP_RANK", ""), _problem(own, host))
    keys = [f"here/{rank}" for rank in range(n_ranks)]
    store.set(f"alive/{own}", "0")
    store.set(keys[own], json.dumps(asdict(told)))
    start = time.monotonic()
    said, pause = False, 0.01
    while not store.check(keys):
        waited = time.monotonic() - start
        missing = [
            rank for rank, key in enumerate(keys) if waited > wait and not store.check([key])
        ]
        if missing:
            raise TrainingError(
                f"rank {own} on {host}: {_ranks(missing)} of {n_ranks} did not come in {wait:g} s; "
                "look at what they said, or whether they were started"
            )
        if waited > _SAY_AFTER and not said:
            said = True
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            logger.warning("rank %d on %s: waiting for %s", own, host, _ranks(missing))
        time.sleep(pause)
        pause = min(2 * pause, _POLL)
    ranks = [Rank(**json.loads(answer)) for answer in store.multi_get(keys)]
    if len({(rank.host, rank.node) for rank in ranks}) > 1:
        for rank in ranks:
            if rank.problem is not None:
                raise ConfigError(rank.problem)
    return ranks


def _ranks(numbers: list[int]) -> str:
    few = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
    return f"rank{'s' * (len(numbers) > 1)} {few}"


def _wait_for_port(address: str, port: int) -> None:
    """Return when somebody listens there; torch would say each failed try at length."""
    start, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except OSError as error:
            waited = time.monotonic() - start
            if waited > WAIT:
                raise ConfigError(
                    f"MASTER_ADDR={address} MASTER_PORT={port}: nobody listens there after "
                    f"{waited:.0f} s ({error.strerror or error}); start rank 0, or give the "
                    "address where it runs"
                ) from error
            if waited > _SAY_AFTER and not said:
                said = True
                logger.warning(
                    "rank %s: nobody listens at %s:%d yet", os.environ["RANK"], address, port
                )
        time.sleep(_POLL)


def _problem(own: int, host: str) -> str | None:
    """Why other machines could not reach this rank, where gloo chooses its address."""
    interfaces = [name for _, name in socket.if_nameindex() if name != "lo"]
    where = f"of rank {own} on {host}"
    way_out = (
        "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) there to the interface that the other "
        f"machines reach ({', '.join(interfaces) or 'it has none'})"
    )
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        unknown = {name.strip() for name in chosen.split(",")} - {*interfaces, "lo"}
        if unknown:
            return f"GLOO_SOCKET_IFNAME={chosen} {where}: there is no {min(unknown)}; {way_out}"
        return None
    address = _own_address(host)
    if address is None:
        return f"GLOO_SOCKET_IFNAME {where}: the machine's name is no address of its own; {way_out}"
    if ip_address(address.partition("%")[0]).is_loopback:
        return (
            f"GLOO_SOCKET_IFNAME {where}: the machine's name is {address}, where no other machine "
            f"reaches it; {way_out}"
        )
    return None


def _own_address(host: str) -> str | None:
    """The address that gloo takes: the first of the machine's name that can be bound."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return address[0]
    return None
