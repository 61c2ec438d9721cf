"""What the processes of an environment print, on its way to the terminal."""

from __future__ import annotations

import contextlib
import os
import threading

from RL2.runtime.secrets import for_terminal

_PIECE = 2**16  # bytes that are read at once, and of a line that are waited for


def passed_on(target: int) -> tuple[int, threading.Thread]:
    """A file to write to, whose lines go on to the file `target` without secrets and what a
    terminal would obey, and the thread that does so until nobody has it open for writing.

    It writes past Python's streams: a thread that holds the lock of one is fatal where the
    interpreter ends. Where `target` takes nothing more, lines are dropped; where its reader is
    slow, writers wait as they would without us.

    Raises OSError: a limit of files or threads.
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
    with open(source, "rb", buffering=0) as pipe:  # closed whatever happens: nobody waits for us
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
