"""Addresses and ports of servers on this machine."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from urllib.parse import urlsplit

from RL2.runtime.errors import EngineError

HOST = "127.0.0.1"
_PORTS_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PORTS = 16384  # how many below those are tried


def free_port() -> int:
    """A port on loopback that nobody listens on now.

    Not one of those that the kernel gives to outgoing connections, where there are others: until a
    server listens, seconds later, one of them could have it.
    """
    first = _first_of_connections()
    candidates = (max(1024, first - _PORTS) + secrets.randbelow(_PORTS) for _ in range(100))
    for port in (*candidates, 0):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise EngineError(f"{HOST} has no free port; end some of what listens there")


def _first_of_connections() -> int:
    try:
        return int(_PORTS_OF_CONNECTIONS.read_text().split()[0])
    except (OSError, ValueError):
        return 32768


def address_towards(url: str) -> str:
    """The address of this machine from which it reaches a server: loopback for one beside us."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing, but takes a route
        return probe.getsockname()[0]
