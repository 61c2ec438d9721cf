"""HTTP requests to an inference server."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from RL2.engines.protocol import MalformedReply
from RL2.runtime.errors import EngineError


class ServerUnreachable(EngineError):
    """No answer: refused, reset, or too late."""


class ServerRefused(EngineError):
    """An answer that is an HTTP error. status: the HTTP status. text: the body of the answer."""

    def __init__(self, message: str, status: int, text: str):
        super().__init__(message)
        self.status, self.text = status, text


def bearer(key: str) -> dict[str, str]:
    """Headers with a key, if there is one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class Server:
    """HTTP access to one server, our own or an external one. Use it on one event loop.

    url: address, such as http://127.0.0.1:30000. headers: sent with each request, e.g. the key.
    """

    def __init__(self, url: str, headers: dict[str, str] | None = None):
        self.url = url.rstrip("/")
        self._headers = headers or {}
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def get(self, path: str, *, timeout: float = 30.0) -> Any:
        """Parsed JSON of the answer, None for an empty one.

        Raises ServerUnreachable, ServerRefused (HTTP status of 400 or more), and MalformedReply
        for an answer that is neither empty nor JSON.
        """
        return await self._request("GET", path, None, timeout)

    async def post(
        self, path: str, body: dict[str, Any] | None = None, *, timeout: float = 60.0
    ) -> Any:
        """As `get`; `body` is sent as JSON."""
        return await self._request("POST", path, body, timeout)

    async def close(self) -> None:
        """Later requests raise ServerUnreachable."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, path: str, body: Any, timeout: float) -> Any:
        if self._closed:
            raise ServerUnreachable(f"{self.url}{path}: closed")
        if self._session is None:
            # The engine limits the number of requests; a second limit could only deadlock. Idle
            # connections are closed before the server does it (uvicorn: after 5 s), which could
            # hit a request.
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
                trust_env=False,
            )
        try:
            async with self._session.request(
                method, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout)
            ) as response:
                raw = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f"no answer in {timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise ServerUnreachable(f"{self.url}{path}: {what or type(error).__name__}") from error
        if status >= 400:
            text = raw.decode("utf-8", "replace").strip()
            raise ServerRefused(f"{self.url}{path}: HTTP {status}: {text:.500}", status, text)
        try:
            return json.loads(raw) if raw.strip() else None
        except ValueError as error:
            raise MalformedReply(f"{self.url}{path}: not JSON: {raw[:200]!r}") from error
