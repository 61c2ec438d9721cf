"""Ending a trainer's process: on Ctrl-C outside of training, and in spite of hanging threads."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE = 10.0  # seconds that threads may take to end after the run


def one_line_for_ctrl_c() -> None:
    """From here on, Ctrl-C ends this process with one line instead of a traceback.

    During training, `stop_signals` handles it. An inherited SIG_IGN stays.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: object) -> None:
    leave_at_once("no step was under way, nothing was saved")


def leave_at_once(text: str) -> None:
    """End this process by SIGINT, so that shells and launchers see why."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"Interrupted: {text}\n")
        sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def end_in_time() -> Iterator[None]:
    """After the body, end this process with the body's status, even if a thread that user code has
    started would keep it alive forever."""
    status = 1
    try:
        yield
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        threading.Thread(target=_force_exit, args=(status,), name="end", daemon=True).start()


def _force_exit(status: int) -> None:
    # Python waits for all threads that are not daemons, and then ends this one.
    time.sleep(_PATIENCE)
    left = [one for one in threading.enumerate() if not one.daemon]
    names = ", ".join(one.name for one in left if one is not threading.main_thread())
    if names:
        sys.stderr.write(
            f"threads that do not end ({names}): the run has ended without them; start threads of "
            "a loss or an environment with daemon=True\n"
        )
        sys.stderr.flush()
        os._exit(status)
