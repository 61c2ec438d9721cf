"""Passes the output of environment processes on to the terminal."""

from __future__ import annotations

import contextlib
import os
import threading

from RL2.runtime.secrets import for_terminal

_PIECE = 2**16  # most bytes per read; a longer line is passed on in pieces


def passed_on(target: int) -> tuple[int, threading.Thread]:
    """A pipe to write to, and the thread that passes its lines on to the file `target`, redacted
    and with control characters escaped. The thread ends when all writers have closed the pipe.

    It does not use Python's streams: a thread that holds the lock of one when the interpreter ends
    is fatal. If `target` cannot be written to, lines are dropped; if its reader is slow, writers
    wait.

    Raises OSError for a limit on files or threads.
    """
    source, writes = os.pipe()
    thread = threading.Thread(target=_pass_on, args=(source, target), daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        os.close(source)
        os.close(writes)
        raise OSError(str(error)) from error
    return writes, thread


def _pass_on(source: int, target: int) -> None:
    with open(source, "rb", buffering=0) as pipe:  # closed in any case: writers must not block
        left = b""
        while data := pipe.read(_PIECE):
            lines, end, left = (left + data).rpartition(b"\n")
            if len(left) >= _PIECE:
                lines, end, left = lines + end + left, b"\n", b""
            _write(lines + end, target)
        _write(left and left + b"\n", target)


def _write(lines: bytes, target: int) -> None:
    lines = lines.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # progress bars
    rest = for_terminal(lines.decode(errors="backslashreplace")).encode()
    with contextlib.suppress(OSError):
        while rest:
            rest = rest[os.write(target, rest) :]
