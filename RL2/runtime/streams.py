"""Standard output and error that may go away: a closed terminal, `| head`, a full disk.

What is written there is for reading along. That nobody can read it any more is no reason to stop.
Needs nothing but the standard library, as the processes of environments import it.
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
_BUSY = 1000  # milliseconds for a reader that is slow, where the file does not block
_SOON = 100  # where the process is to end
_NAMES = {"stdout": 1, "stderr": 2}


def keep_streams() -> None:
    """From here on, what this process writes to stdout and stderr raises nothing.

    Text that finds no room, or that the encoding cannot show, is dropped or escaped. Where one of
    them was closed, its number stands for `/dev/null`, lest the next file that is opened, such as a
    checkpoint, gets what libraries write to it.
    """
    for name, fd in _NAMES.items():
        old = getattr(sys, name)
        if old is None:
            fd = _stand_in(fd)
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
            continue  # somebody has put an object of their own there
        raw = _Unfailing(fd)
        unbuffered = old is not None and isinstance(old.buffer, io.RawIOBase)
        buffer = raw if unbuffered else io.BufferedWriter(raw)
        new = _Open(buffer, errors="backslashreplace", **options)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def hurry_streams() -> None:
    """From here on, wait for no reader that has stopped to read."""
    for name in _NAMES:
        raw = getattr(getattr(sys, name), "buffer", None)
        raw = getattr(raw, "raw", raw)
        if isinstance(raw, _Unfailing):
            raw.hurried = True


def look_after_streams() -> None:
    """Have stdout and stderr be `/dev/null` where nobody will read them any more: what this process
    starts inherits them, and would fail."""
    poll = select.poll()
    for fd in _NAMES.values():
        poll.register(fd, 0)
    for fd, events in poll.poll(0):
        if events & (select.POLLERR | select.POLLHUP):
            _forget(fd)


class _Open(io.TextIOWrapper):
    """Stays open: a library or a stranger's code that closes it would end everybody's output."""

    def close(self) -> None:
        self.flush()

    def detach(self) -> Any:
        raise io.UnsupportedOperation("detach")


class _Unfailing(io.FileIO):
    """A file descriptor that takes whatever is written to it."""

    def __init__(self, fd: int):
        super().__init__(fd, "w", closefd=False)
        self.hurried = False

    def write(self, data: Any) -> int:
        """All of it, or as much as can be."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            # In pieces: more would block where there is not room for all of it.
            while left and self._has_room():
                left = left[super().write(left[: select.PIPE_BUF]) or 0 :]
        except OSError as error:
            # A disk may have room again.
            if error.errno not in _FULL and not _is_file(self.fileno()):
                _forget(self.fileno())
        return size

    def _has_room(self) -> bool:
        """Wait for a reader: as long as it takes, but where somebody who shares the file has made
        it non-blocking, or this process is to end soon."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        while not poll.poll(_SOON if self.hurried else _BUSY):
            if self.hurried or not os.get_blocking(self.fileno()):
                return False
        return True


def _stand_in(fd: int) -> int:
    """A descriptor of `/dev/null`: `fd`, which was closed, unless it is somebody else's by now."""
    try:
        os.fstat(fd)
    except OSError:
        _forget(fd)
        return fd
    return os.open(os.devnull, os.O_WRONLY)


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _forget(fd: int) -> None:
    """`fd` is `/dev/null` from here on."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)
    os.set_inheritable(fd, True)
