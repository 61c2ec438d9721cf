"""What goes over the socket between the trainer and a process of an environment.

Standard library only, as `calls`.
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

_MAX_FRAME = 2**31  # bytes; the trainer sends what it has, a worker never more than two answers
_LENGTH = struct.Struct("!I")


def frame(head: dict[str, Any], *bodies: bytes) -> bytes:
    """A message: a head that JSON can hold, and bytes. Nobody unpickles the head."""
    parts = (json.dumps(head | {"bodies": len(bodies)}).encode(), *bodies)
    content = b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))
    return _LENGTH.pack(len(content)) + content


async def receive(
    reader: asyncio.StreamReader, limit: int = _MAX_FRAME
) -> tuple[dict[str, Any], list[bytes]]:
    """Head and bodies of the next message. Raises EOFError, OSError, or ValueError for what is no
    message or longer than `limit`."""
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
    """An extra_info, pickled: the trainer hands it on as it is. Raises Failed."""
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
    """What `pickled` was given. Raises Failed."""
    try:
        return pickle.loads(data)
    except Exception as error:
        raise Failed(f"extra_info cannot be unpickled: {describe(error)}") from error


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > MAX_ANSWER:
            raise Failed(f"extra_info is longer than {MAX_ANSWER} bytes (pickled)")
        return super().write(data)
