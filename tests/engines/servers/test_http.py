"""Requests to a server, and what comes back."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from RL2.engines.protocol import MalformedReply
from RL2.engines.servers.addresses import free_port
from RL2.engines.servers.http import Server, ServerRefused, ServerUnreachable, bearer

SCRIPTED = str(Path(__file__).with_name("scripted_server.py"))


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """(port, folder) of a running scripted server."""
    monkeypatch.setenv("SCRIPTED_KEY", "secret")
    port = free_port()
    process = subprocess.Popen([sys.executable, SCRIPTED, str(port), str(tmp_path)])
    asyncio.run(until_up(port))
    yield port, tmp_path
    process.kill()
    process.wait()


async def until_up(port):
    server = Server(f"http://127.0.0.1:{port}")
    for _ in range(200):
        try:
            await server.get("/health")
            break
        except ServerUnreachable:
            await asyncio.sleep(0.05)
    await server.close()


def ask(port, key="secret", timeout=5.0):
    async def run():
        server = Server(f"http://127.0.0.1:{port}", {"key": key})
        try:
            body = {"token_ids": [1, 2], "seed": 5, "max_new_tokens": 3}
            return await server.post("/generate", body, timeout=timeout)
        finally:
            await server.close()

    return asyncio.run(run())


def test_answers_and_errors(scripted):
    port, folder = scripted
    assert ask(port) == {"tokens": [8, 9, 10], "logps": [-0.0] * 3, "finish": "length"}
    with pytest.raises(ServerRefused, match="HTTP 401: no key") as caught:
        ask(port, key="wrong")
    assert caught.value.status == 401
    (folder / "reply").write_text('["{broken", "hang"]')
    with pytest.raises(MalformedReply, match="not JSON"):
        ask(port)
    with pytest.raises(ServerUnreachable, match="no answer in 0.3 s"):
        ask(port, timeout=0.3)
    with pytest.raises(ServerUnreachable):
        ask(free_port())


def test_a_key_is_sent_where_there_is_one():
    assert bearer("x") == {"Authorization": "Bearer x"} and bearer("") == {}
