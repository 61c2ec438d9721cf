"""What a process of an environment was doing last, which it tells without a word.

Code that blocks (a regular expression, a C library) holds the interpreter: no thread of that
process can send anything then, and what it sent before may lie unread in the socket. So each step
writes down which call it belongs to, in memory that the trainer shares, which costs no system call
and can be read when the process hangs or is gone.

Standard library only, as `calls`.
"""

from __future__ import annotations

import contextvars
import mmap
import struct
import threading
from collections.abc import Coroutine
from typing import Any


class Pulse:
    """What a worker was doing last, in memory that the trainer reads.

    beats: changes as long as the process moves. call: number of the call whose code is being
    executed, 0 while none is. begun: the last call that was begun. threads: whether threads of the
    environment ran beside it then, which may be what stopped the process.
    """

    _FIELDS = struct.Struct("=QQQQ")
    SIZE = _FIELDS.size

    def __init__(self, memory: mmap.mmap):
        self._memory = memory
        self.beats = self.call = self.begun = self.threads = 0

    def read(self) -> tuple[int, int, int, bool]:
        """beats, call, begun, threads as the other process wrote them."""
        *numbers, threads = self._FIELDS.unpack_from(self._memory)
        return *numbers, bool(threads)

    def enter(self, call: int) -> int:
        """The code of a call is executed from here on (0: none); returns which was before."""
        before, self.call = self.call, call
        if call > self.begun:
            self.begun = call
        self.threads = threading.active_count() > 1
        self.beat()
        return before

    def beat(self) -> None:
        self.beats += 1
        self._FIELDS.pack_into(self._memory, 0, self.beats, self.call, self.begun, self.threads)

    def close(self) -> None:
        self._memory.close()


CURRENT_CALL: contextvars.ContextVar[int] = contextvars.ContextVar("call", default=0)


class Traced(Coroutine):
    """A coroutine that notes in the pulse for which call it is executed, at each of its steps.

    All tasks of the event loop are such ones, those that an environment makes itself as well: they
    inherit the number of the call that made them.
    """

    def __init__(self, coroutine: Coroutine, pulse: Pulse):
        self._coroutine, self._pulse = coroutine, pulse

    def send(self, value: Any) -> Any:
        before = self._pulse.enter(CURRENT_CALL.get())
        try:
            return self._coroutine.send(value)
        finally:
            self._pulse.enter(before)

    def throw(self, *error: Any) -> Any:
        before = self._pulse.enter(CURRENT_CALL.get())
        try:
            return self._coroutine.throw(*error)
        finally:
            self._pulse.enter(before)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()
