"""Addresses and ports of servers on this machine."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from urllib.parse import urlsplit

from RL2.runtime.errors import EngineError

HOST = "127.0.0.1"
_PORTS_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PORTS = 16384  # size of the range below them that is tried


def free_port() -> int:
    """A port on loopback that is free now.

    If possible not one of those that the kernel gives to outgoing connections: a connection could
    take it before the server listens, seconds later.
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
    """The address from which this machine reaches a server; loopback for a local one."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing, only picks a route
        return probe.getsockname()[0]
