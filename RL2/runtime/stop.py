"""Signals that ask a run to end, a launcher that is gone: it saves where it stands and ends."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# What ends a process that does not listen, and what people, schedulers and terminals send to have
# one end: kill, Ctrl-C, a terminal that closes, Ctrl-\, a time limit, a power supply.
_NAMES = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR")
NUMBERS = tuple(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))
# Timers, and what a library may use for itself; they are heard where nobody has a handler for them.
_OTHERS = ("ALRM", "VTALRM", "PROF", "IO", "ABRT", "STKFLT")
OTHERS = (
    *(getattr(signal, f"SIG{name}") for name in _OTHERS if hasattr(signal, f"SIG{name}")),
    *(range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if hasattr(signal, "SIGRTMIN") else ()),
)
# The same one again means: at once. The others come several times for one reason.
_URGENT = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_GRACE = 30.0  # seconds from SIGTERM to SIGKILL, as torchrun has it


class StopRequest:
    """Whether this process was asked to stop, and what shall happen at once when it is.

    number: of the signal, None as long as there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._callbacks: list[Callable[[], None]] = []

    def call(self, callback: Callable[[], None]) -> None:
        """Have something called, in the main thread between two lines, when a signal comes."""
        self._callbacks.append(callback)
        if self.number is not None:
            callback()

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """A signal's handler.

        The same one again ends the process as if there were no handler. Not under torchrun: that
        passes on what a scheduler sends to all processes of a job, so that it comes twice, and
        kills what does not end in time.
        """
        if number in _URGENT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, _default(number))
        if self.number is None:
            self.number = number
            for callback in self._callbacks:
                callback()


def _default(number: int) -> signal.Handlers | Callable:
    """What Python does with a signal."""
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


def _is_free(number: int) -> bool:
    """Whether nobody has a handler for a signal, and it would end this process."""
    if number == signal.SIGABRT and faulthandler.is_enabled():
        return False
    return signal.getsignal(number) == signal.SIG_DFL


@contextmanager
def stop_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """A request that a signal fills while the body runs: the one given, or a new one.

    A signal that whoever started us has ignored, as `nohup` does, stays ignored. Python only lets
    the main thread have handlers; elsewhere the request stays empty.
    """
    request = request or StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
    heard += [number for number in OTHERS if _is_free(number)]
    before = {number: signal.signal(number, request.receive) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: of a library in C, which cannot be given back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def follow_launcher() -> None:
    """Have this process stop, as by SIGTERM, when the torchrun that has started it is gone.

    torchrun ends its processes itself unless it is killed with -9; then they would train on, and
    nobody would see them. Without torchrun nothing happens: a run may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    there = _may_be_launcher(launcher)  # it may have been killed while Python started

    def follow() -> None:
        while there and os.getppid() == launcher:
            time.sleep(0.5)
        heard = [each for each in NUMBERS if signal.getsignal(each) != signal.SIG_IGN]
        os.kill(os.getpid(), heard[0] if heard else signal.SIGKILL)
        time.sleep(_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)  # it hangs, as in a collective that nobody joins

    threading.Thread(target=follow, name="follow-launcher", daemon=True).start()


def _may_be_launcher(pid: int) -> bool:
    """Whether a parent is not one that has adopted us, such as init: torchrun runs in Python, and
    a script between it and us has its variables."""
    process = Path("/proc", str(pid))
    if pid == 0 or not Path("/proc/self").exists():  # in another namespace; not Linux
        return True
    try:
        if "python" in Path(os.readlink(process / "exe")).name:
            return True
        return b"TORCHELASTIC_RUN_ID=" in (process / "environ").read_bytes()
    except OSError:  # gone meanwhile, or somebody else's
        return False
