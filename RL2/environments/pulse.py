"""What an environment process was doing last, in memory that the trainer shares.

Code that blocks (a regular expression, a C library) holds the interpreter: no thread of that
process can send anything then, and what it sent before may be unread in the socket. So each step
records which call it belongs to in shared memory. This costs no system call, and the trainer can
read it when the process hangs or is gone.

Standard library only, like `calls`.
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

    beats: a counter that grows while the process makes progress. call: number of the call whose
    code is being executed, 0 if none. begun: the last call that was begun. threads: whether threads
    of the environment ran at the same time, as one of them may have blocked the process.
    """

    _FIELDS = struct.Struct("=QQQQ")
    SIZE = _FIELDS.size

    def __init__(self, memory: mmap.mmap):
        self._memory = memory
        self.beats = self.call = self.begun = self.threads = 0

    def read(self) -> tuple[int, int, int, bool]:
        """The last beats, call, begun and threads that the other process wrote."""
        *numbers, threads = self._FIELDS.unpack_from(self._memory)
        return *numbers, bool(threads)

    def enter(self, call: int) -> int:
        """Note that the code of `call` runs from here on (0: none); returns the one before."""
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
    """A coroutine that records in the pulse, at each of its steps, for which call it is executed.

    All tasks of the event loop are traced, including those that an environment makes: they inherit
    the number of the call that made them.
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
