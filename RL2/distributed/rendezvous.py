"""How the ranks of a run find each other, within bounded time and by name."""

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from ipaddress import ip_address

import torch.distributed as dist

from RL2.config.launcher import hosts_store
from RL2.distributed.same_start import Facts, difference, fingerprint, packed, unpacked
from RL2.runtime.errors import ConfigError, TrainingError, first_line

logger = logging.getLogger(__name__)

# Seconds for all ranks to arrive, and to connect. They start together, but imports may take long.
WAIT = 600.0
_SAY_AFTER = 30.0
_POLL = 0.5
_STAY = 10.0  # seconds that a rank which ends waits until the others have read the reason
_GIVE_UP = 30.0  # the same if its own checks fail; the imports of the others may take long
_FAILED = "failed"

# A sweep starts one run after the other in the same processes, and torchrun's store remembers the
# keys of all of them.
_RUNS = itertools.count()


@dataclass(frozen=True)
class Rank:
    """What a rank tells the others.

    host: its machine's name.
    node: torchrun's number of the machine, empty without torchrun.
    problem: why the others cannot reach it, None if they can.
    facts: fingerprint of what it was started with.
    process: its process id.
    """

    host: str
    node: str = ""
    problem: str | None = None
    facts: str = ""
    process: int = 0


def next_prefix() -> str:
    """The prefix of this run's keys in the store that all runs share. Call it once per run."""
    prefix = f"run{next(_RUNS)}"
    # Ranks that torchrun restarts find the keys of the earlier ones. (With several machines, each
    # has its own count.)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        prefix += f"-{restarts}"
    return prefix


def find_store(wait: float | None = None) -> dist.Store:
    """The store where the ranks meet, as torchrun or its variables describe it.

    wait: seconds until it must answer.

    Raises ConfigError if it does not answer, or rank 0 cannot listen there.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = hosts_store()
    wait = WAIT if wait is None else wait
    if not hosts:
        _wait_for_port(address, port, wait)
    try:
        return dist.TCPStore(
            address, port, is_master=hosts, wait_for_workers=False, multi_tenant=hosts,
            timeout=timedelta(seconds=wait),
        )  # fmt: skip
    except dist.DistError as error:
        does = "listen" if hosts else "connect to rank 0"
        raise ConfigError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: rank {os.environ['RANK']} cannot {does} "
            f"there ({first_line(error)}); choose another port, or the machine of rank 0"
        ) from error


def meet(
    store: dist.Store, own: int, n_ranks: int, facts: Facts | None = None, wait: float = WAIT
) -> list[Rank]:
    """All ranks, once all have arrived. Like a collective, but before any process group exists.

    facts: what this rank was started with.

    Raises ConfigError, the same on all ranks, if one cannot be reached or was started with
    something else, and TrainingError that names the ranks that did not arrive in `wait` seconds, or
    the one that has given up.
    """
    host = socket.gethostname()
    text = packed(facts or {})
    told = Rank(
        host, os.environ.get("GROUP_RANK", ""), _problem(own, host), fingerprint(text), os.getpid()
    )
    with _ending_together(store, own, n_ranks, host):
        _check_interfaces(own, host)
        _take_place(store, own, n_ranks, told)
        store.set(f"facts/{own}", text)
        store.set(f"alive/{own}", "0")
        _wait_for_all(store, own, n_ranks, host, wait)
        ranks = [Rank(**json.loads(one)) for one in store.multi_get(_keys("here", n_ranks))]
        if len({(rank.host, rank.node) for rank in ranks}) > 1:
            for rank in ranks:
                if rank.problem is not None:
                    raise ConfigError(rank.problem)
        for other, rank in enumerate(ranks):
            if rank.facts != ranks[0].facts:
                both = [unpacked(store.get(f"facts/{which}").decode()) for which in (0, other)]
                # The ranks before it are like rank 0.
                line = difference([both[0]] * other + [both[1]], [rank.host for rank in ranks])
                raise ConfigError(line)
    return ranks


def give_up(reason: str) -> None:
    """Tell the ranks that wait in `meet` why this one does not arrive. It tries for some seconds;
    ranks that arrive later run into their own time limit."""
    own, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with suppress(ConfigError, dist.DistError):
        store = dist.PrefixStore(next_prefix(), find_store(2 * _GIVE_UP))
        store.compare_set(_FAILED, "", f"rank {own} on {socket.gethostname()}: {reason}")
        _stay(store, own, n_ranks, _GIVE_UP)


@contextmanager
def _ending_together(store: dist.Store, own: int, n_ranks: int, host: str) -> Iterator[None]:
    """If this rank ends, tell the others why before the store ends, perhaps with this process."""
    try:
        yield
    except ConfigError as error:
        store.compare_set(_FAILED, "", str(error))
        _stay(store, own, n_ranks)
        raise
    except dist.DistError as error:
        raise TrainingError(
            f"rank {own} on {host}: the connection to where the ranks meet "
            f"({os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}) is lost "
            f"({first_line(error)}); the output of rank 0, or of torchrun there, has the reason"
        ) from error


def _stay(store: dist.Store, own: int, n_ranks: int, wait: float | None = None) -> None:
    """Wait until all others have read the reason, at most `wait` seconds."""
    end = time.monotonic() + (_STAY if wait is None else wait)
    with suppress(dist.DistError):
        store.set(f"heard/{own}", "")
        while not store.check(_keys("heard", n_ranks)) and time.monotonic() < end:
            time.sleep(_POLL / 10)
        if n_ranks > 1:  # others may be reading; torch logs a lost store at length
            time.sleep(_POLL)


def _take_place(store: dist.Store, own: int, n_ranks: int, told: Rank) -> None:
    """Raise ConfigError if another process has this rank's number, or another WORLD_SIZE."""
    size = f"WORLD_SIZE={n_ranks}"
    first = store.compare_set("world_size", "", f"{size} of rank {own} on {told.host}").decode()
    if first.partition(" ")[0] != size:
        raise ConfigError(
            f"{size} of rank {own} on {told.host} and {first}: must be the same for all ranks; "
            "start all with the same number of machines and processes"
        )
    text = json.dumps(asdict(told))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun numbers the ranks; an existing entry may be of a rank that it has replaced.
        store.set(f"here/{own}", text)
        return
    there = store.compare_set(f"here/{own}", "", text).decode()
    if there != text:
        other = Rank(**json.loads(there))
        raise ConfigError(
            f"RANK={own}: process {told.process} on {told.host} and process {other.process} on "
            f"{other.host} both have it; number the ranks from 0 to {n_ranks - 1}, and give each "
            "run a MASTER_PORT of its own"
        )


def _wait_for_all(store: dist.Store, own: int, n_ranks: int, host: str, wait: float) -> None:
    keys = _keys("here", n_ranks)
    start = time.monotonic()
    said, pause = False, 0.01
    while not store.check(keys):
        _raise_failure(store, own, n_ranks)
        waited = time.monotonic() - start
        missing = [
            rank for rank, key in enumerate(keys) if waited > wait and not store.check([key])
        ]
        if missing:
            raise TrainingError(
                f"rank {own} on {host}: {_ranks(missing)} of {n_ranks} did not start in {wait:g} "
                "s; look at their output, or whether they were started"
            )
        if waited > _SAY_AFTER and not said:
            said = True
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            logger.warning("rank %d on %s: waiting for %s", own, host, _ranks(missing))
        time.sleep(pause)
        pause = min(2 * pause, _POLL)


def _raise_failure(store: dist.Store, own: int, n_ranks: int) -> None:
    if store.check([_FAILED]):
        reason = store.get(_FAILED).decode()
        _stay(store, own, n_ranks)
        raise TrainingError(f"not started, as another rank ends: {reason}")


def _keys(name: str, n_ranks: int) -> list[str]:
    return [f"{name}/{rank}" for rank in range(n_ranks)]


def _ranks(numbers: list[int]) -> str:
    few = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
    return f"rank{'s' * (len(numbers) > 1)} {few}"


def _wait_for_port(address: str, port: int, wait: float) -> None:
    """Return once a process listens there; torch would log each failed try at length."""
    start, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except OSError as error:
            waited = time.monotonic() - start
            if waited > wait:
                raise ConfigError(
                    f"MASTER_ADDR={address} MASTER_PORT={port}: no process listens there after "
                    f"{waited:.0f} s ({error.strerror or error}); start rank 0, or give the "
                    "address where it runs"
                ) from error
            if waited > _SAY_AFTER and not said:
                said = True
                logger.warning(
                    "rank %s: no process listens at %s:%d yet", os.environ["RANK"], address, port
                )
        time.sleep(_POLL)


def _problem(own: int, host: str) -> str | None:
    """Why other machines could not reach this rank at the address that gloo would choose."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return None  # the user has chosen
    where = f"of rank {own} on {host}"
    interfaces = [name for name in _interfaces() if name != "lo"]
    way_out = (
        "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) there to the interface that the other "
        f"machines reach ({', '.join(interfaces) or 'it has none'})"
    )
    address = _own_address(host)
    if address is None:
        return f"GLOO_SOCKET_IFNAME {where}: the machine's name is not its own address; {way_out}"
    if ip_address(address.partition("%")[0]).is_loopback:
        return (
            f"GLOO_SOCKET_IFNAME {where}: the machine's name is {address}, where other machines "
            f"cannot reach it; {way_out}"
        )
    return None


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _check_interfaces(own: int, host: str) -> None:
    """Raise ConfigError if GLOO_SOCKET_IFNAME names an interface that this machine lacks."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    unknown = {*chosen.split(",")} - {*_interfaces()} if chosen else set()
    if unknown:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={chosen} of rank {own} on {host}: there is no interface "
            f"{min(unknown)!r}; use {' or '.join(_interfaces())}, or leave it out"
        )


def _own_address(host: str) -> str | None:
    """The address that gloo uses: the first of the machine's name that can be bound."""
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
