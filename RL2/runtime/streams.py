"""Keep running when stdout or stderr goes away: a closed terminal, `| head`, a full disk.

Output is for people who watch the run; the run must not fail because nobody can read it.
Standard library only, as environment processes import this module.
"""

import contextlib
import errno
import io
import os
import select
import stat
import sys
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUSY = 1000  # milliseconds to wait for a slow reader of a non-blocking file
_SOON = 100  # the same when the process is about to end
_NAMES = {"stdout": 1, "stderr": 2}


def keep_streams() -> None:
    """From here on, writing to stdout and stderr never raises.

    Text that does not fit is dropped; characters that cannot be encoded are escaped. A stream that
    was closed is opened on `/dev/null`: otherwise the next file that is opened, such as a
    checkpoint, would get its number and what libraries write to it.
    """
    for name, fd in _NAMES.items():
        old = getattr(sys, name)
        if old is None:
            fd = _open_null(fd)
            options = {"encoding": "utf-8", "line_buffering": True}
        elif isinstance(old, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                old.flush()
            options = {
                "encoding": old.encoding,
                "line_buffering": old.line_buffering,
                "write_through": old.write_through,
            }
        else:
            continue  # replaced by user code or a library
        raw = _Unfailing(fd)
        unbuffered = old is not None and isinstance(old.buffer, io.RawIOBase)
        buffer = raw if unbuffered else io.BufferedWriter(raw)
        new = _Open(buffer, errors="backslashreplace", **options)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def hurry_streams() -> None:
    """From here on, do not wait for a reader that has stopped reading."""
    for name in _NAMES:
        raw = getattr(getattr(sys, name), "buffer", None)
        raw = getattr(raw, "raw", raw)
        if isinstance(raw, _Unfailing):
            raw.hurried = True


def replace_broken_streams() -> None:
    """Point stdout and stderr to `/dev/null` if their reader is gone: child processes inherit
    them, and would fail."""
    poll = select.poll()
    for fd in _NAMES.values():
        poll.register(fd, 0)
    for fd, events in poll.poll(0):
        if events & (select.POLLERR | select.POLLHUP):
            _point_to_null(fd)


class _Open(io.TextIOWrapper):
    """Cannot be closed: a library or user code that closes it would end all output."""

    def close(self) -> None:
        self.flush()

    def detach(self) -> Any:
        raise io.UnsupportedOperation("detach")


class _Unfailing(io.FileIO):
    """A file descriptor; writing to it never fails."""

    def __init__(self, fd: int):
        super().__init__(fd, "w", closefd=False)
        self.hurried = False

    def write(self, data: Any) -> int:
        """Write as much as possible; reports all as written."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            # In pieces: a larger write would block unless all of it fits.
            while left and self._has_room():
                left = left[super().write(left[: select.PIPE_BUF]) or 0 :]
        except OSError as error:
            # A disk may have room again.
            if error.errno not in _FULL and not _is_file(self.fileno()):
                _point_to_null(self.fileno())
        return size

    def _has_room(self) -> bool:
        """Wait until the reader has room. There is a time limit if this process is about to end,
        or if another process that shares the file has made it non-blocking."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        while not poll.poll(_SOON if self.hurried else _BUSY):
            if self.hurried or not os.get_blocking(self.fileno()):
                return False
        return True


def _open_null(fd: int) -> int:
    """A descriptor of `/dev/null`: `fd`, which was closed, unless it is in use again."""
    try:
        os.fstat(fd)
    except OSError:
        _point_to_null(fd)
        return fd
    return os.open(os.devnull, os.O_WRONLY)


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _point_to_null(fd: int) -> None:
    """Point `fd` to `/dev/null`."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)
    os.set_inheritable(fd, True)
