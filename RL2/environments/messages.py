"""Messages on the socket between the trainer and an environment process.

Standard library only, like `calls`.
"""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import socket
import struct
from typing import Any

from RL2.environments.calls import MAX_ANSWER, Failed, describe

_MAX_FRAME = 2**31  # bytes; for messages of the trainer, those of workers have a lower limit
_LENGTH = struct.Struct("!I")


def frame(head: dict[str, Any], *bodies: bytes) -> bytes:
    """A message: a JSON head, and bytes. The head is never unpickled."""
    parts = (json.dumps(head | {"bodies": len(bodies)}).encode(), *bodies)
    content = b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))
    return _LENGTH.pack(len(content)) + content


async def receive(
    reader: asyncio.StreamReader, limit: int = _MAX_FRAME
) -> tuple[dict[str, Any], list[bytes]]:
    """Head and bodies of the next message. Raises EOFError, OSError, or ValueError for data that is
    not a message or is longer than `limit`."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > limit:
        raise ValueError(f"a message of {length} bytes")
    return parts_of(await reader.readexactly(length))


def greeting(connection: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """The first message on a connection, without asyncio. Raises EOFError, OSError, ValueError."""

    def read(n: int) -> bytes:
        data = b""
        while len(data) < n:
            more = connection.recv(n - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    return parts_of(read(length))


def parts_of(content: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Head and bodies of a message without its length. Raises ValueError."""
    parts, at = [], 0
    while at < len(content):
        try:
            (length,) = _LENGTH.unpack_from(content, at)
        except struct.error as error:
            raise ValueError("a message that ends too early") from error
        at += _LENGTH.size
        parts.append(content[at : at + length])
        at += length
    head = json.loads(parts[0]) if parts else None
    if not isinstance(head, dict) or head.get("bodies") != len(parts) - 1 or at != len(content):
        raise ValueError("not a message")
    return head, parts[1:]


def pickled(extra_info: dict[str, Any]) -> bytes:
    """An extra_info, pickled. The trainer passes it on without unpickling it. Raises Failed."""
    buffer = _Bounded()
    try:
        pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(extra_info)
    except Failed:
        raise
    except Exception as error:
        raise Failed(
            f"extra_info cannot go to another process ({describe(error)}); put plain data in it, "
            "or use rollout.env_workers=0"
        ) from error
    return buffer.getvalue()


def unpickled(data: bytes) -> dict[str, Any]:
    """The extra_info that `pickled` was called with. Raises Failed."""
    try:
        return pickle.loads(data)
    except Exception as error:
        raise Failed(f"extra_info cannot be unpickled: {describe(error)}") from error


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > MAX_ANSWER:
            raise Failed(f"extra_info is longer than {MAX_ANSWER} bytes (pickled)")
        return super().write(data)
