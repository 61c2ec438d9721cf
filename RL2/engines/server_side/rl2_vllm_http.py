"""Inside a vLLM server: all endpoints but the health check require the key.

vLLM itself protects /v1 and /inference only, and not what development mode adds: anyone who can
reach the port could replace weights and run code in the workers.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

_OPEN = frozenset({"/health"})


class RequireKey:
    """ASGI middleware (`--middleware`): 401 without the bearer token of `VLLM_API_KEY`.

    Raises RuntimeError if that variable is empty: the server must not start unprotected.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY", "")
        if not key:
            raise RuntimeError("VLLM_API_KEY is not set: set it to the key that clients must send")
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in _OPEN:
            return await self._app(scope, receive, send)
        if scope["type"] == "http":
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if hmac.compare_digest(sent, self._expected):
                return await self._app(scope, receive, send)
            headers = [(b"content-type", b"application/json"), (b"content-length", b"24")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            return await send({"type": "http.response.body", "body": b'{"error":"Unauthorized"}'})
        # A websocket: we use no such endpoint.
        await send({"type": "websocket.close", "code": 1008})
