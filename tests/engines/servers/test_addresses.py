"""Ports on this machine, and the address that a server sees."""

import socket

from RL2.engines.servers.addresses import _first_of_connections, address_towards, free_port


def test_free_ports_are_not_those_of_outgoing_connections():
    first = _first_of_connections()
    ports = [free_port() for _ in range(50)]
    assert all(1024 <= port < first for port in ports) and len({*ports}) > 40


def test_where_all_other_ports_are_taken_the_kernel_chooses(monkeypatch):
    monkeypatch.setattr("secrets.randbelow", lambda n: n - 1)
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        assert free_port() >= _first_of_connections() > port


def test_a_server_beside_us_sees_loopback():
    assert address_towards("http://127.0.0.1:1") == "127.0.0.1"
