"""Inside a vLLM server: no endpoint but the health check answers without the key.

vLLM's own key guards /v1 and /inference only, and leaves open what development mode adds: weights
could be replaced and code run in the workers by anyone who reaches the port.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

_OPEN = frozenset({"/health"})


class RequireKey:
    """ASGI middleware (`--middleware`): 401 without the bearer token of `VLLM_API_KEY`.

    Raises RuntimeError where that variable is empty: the server must not start unguarded.
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
        # A websocket: none of the endpoints that we use is one.
        await send({"type": "websocket.close", "code": 1008})
