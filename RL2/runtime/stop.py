"""Save and stop when a signal asks the run to end, or when its launcher is gone."""

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

# Signals that people, schedulers and terminals send to end a process: kill, Ctrl-C, a closed
# terminal, Ctrl-\, a time limit, a power failure. Without a handler they end it at once.
_NAMES = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR")
NUMBERS = tuple(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))
# Timers, and signals that a library may use itself; handled only if they have no handler yet.
_OTHERS = ("ALRM", "VTALRM", "PROF", "IO", "ABRT", "STKFLT")
OTHERS = (
    *(getattr(signal, f"SIG{name}") for name in _OTHERS if hasattr(signal, f"SIG{name}")),
    *(range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if hasattr(signal, "SIGRTMIN") else ()),
)
# A repetition of these means "at once". The others may come several times for one reason.
_URGENT = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_GRACE = 30.0  # seconds from SIGTERM to SIGKILL, as in torchrun


class StopRequest:
    """Whether this process was asked to stop, and what to call when it is.

    number: the number of the signal, None if there was none yet.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._callbacks: list[Callable[[], None]] = []

    def call(self, callback: Callable[[], None]) -> None:
        """Call `callback` when a signal comes, in the main thread (or now, if one came already)."""
        self._callbacks.append(callback)
        if self.number is not None:
            callback()

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler.

        A second signal of the same kind ends the process as if there were no handler. Not under
        torchrun: it passes on what a scheduler sends to all processes of a job, so that each signal
        comes twice, and it kills what does not end in time.
        """
        if number in _URGENT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, _default(number))
        if self.number is None:
            self.number = number
            for callback in self._callbacks:
                callback()


def _default(number: int) -> signal.Handlers | Callable:
    """Python's own handler of a signal."""
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


def _is_free(number: int) -> bool:
    """Whether a signal has no handler yet and would end this process."""
    if number == signal.SIGABRT and faulthandler.is_enabled():
        return False
    return signal.getsignal(number) == signal.SIG_DFL


@contextmanager
def stop_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Fill a request (the one given, or a new one) when a signal comes while the body runs.

    A signal that the parent process has set to be ignored, as `nohup` does, stays ignored. Python
    allows handlers in the main thread only; in others the request stays empty.
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
            # None: a handler of C code, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def follow_launcher() -> None:
    """Stop this process, as by SIGTERM, when the torchrun that has started it is gone.

    torchrun ends its processes unless it is killed with SIGKILL; then they would go on training
    unnoticed. Without torchrun nothing happens: a run may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    there = _may_be_launcher(launcher)  # False if it was killed while Python started

    def follow() -> None:
        while there and os.getppid() == launcher:
            time.sleep(0.5)
        heard = [each for each in NUMBERS if signal.getsignal(each) != signal.SIG_IGN]
        os.kill(os.getpid(), heard[0] if heard else signal.SIGKILL)
        time.sleep(_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)  # it hangs, e.g. in a collective without the others

    threading.Thread(target=follow, name="follow-launcher", daemon=True).start()


def _may_be_launcher(pid: int) -> bool:
    """Whether the parent is not one that has adopted us, such as init: torchrun runs in Python, and
    a script between torchrun and us has inherited its variables."""
    process = Path("/proc", str(pid))
    if pid == 0 or not Path("/proc/self").exists():  # in another namespace; not Linux
        return True
    try:
        if "python" in Path(os.readlink(process / "exe")).name:
            return True
        return b"TORCHELASTIC_RUN_ID=" in (process / "environ").read_bytes()
    except OSError:  # gone meanwhile, or another user's
        return False
