"""Signs of life between the ranks of a run.

A rank waits in a collective for as long as others generate, which may take hours, so a collective
has no useful time limit. Instead, each rank sends a sign of life every few seconds, from a thread
that neither a rollout nor an update blocks. If a machine, a link or a process is lost, the other
ranks end and name it.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch.distributed as dist

from RL2.distributed.rendezvous import Rank
from RL2.runtime.errors import RL2Error, TrainingError, first_line

logger = logging.getLogger(__name__)

_LEFT = b"left"
_MOST_PAUSE = 5.0  # seconds between two signs of life, at most
_AFTER_THE_FIRST = 5.0  # seconds for torchrun to end the others after the first has logged
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_RESUME = "trainer.load_ckpt_from=latest resumes from the last checkpoint"
# Messages of gloo and nccl when the other side is lost.
_CONNECTION = (
    "Connection closed by peer", "Connection reset", "Broken pipe", "imed out", "Read error",
    "No route to host", "ncclRemoteError",
)  # fmt: skip


@contextmanager
def watching(
    store: dist.Store,
    own: int,
    ranks: list[Rank],
    limit: float,
    end: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """While the body runs, send signs of life, and end if another rank sends none for `limit`
    seconds. Rank 0 watches all, the others watch rank 0, which tells them which rank is lost.

    store: a connection that nothing else uses.
    end: called with the reason; None ends this process.
    """
    done = threading.Event()
    others = [rank for rank in range(len(ranks)) if rank != own] if own == 0 else [0]
    heard: dict[int, bytes] = {}  # the last sign of each
    told: list[str] = []  # by rank 0
    pause = min(_MOST_PAUSE, limit / 6)

    def talk() -> None:
        beats = 0
        while not done.is_set():
            beats += 1
            # Errors are ignored, as `listen` ends the run after a long silence. The store may hang.
            with suppress(dist.DistError, RuntimeError):
                store.set(f"alive/{own}", str(beats))
                signs = store.multi_get([f"alive/{rank}" for rank in others])
                heard.update(zip(others, map(bytes, signs), strict=True))
                if store.check(["lost"]):
                    told.append(store.get("lost").decode())
            done.wait(pause)

    def listen() -> None:
        silent, last = dict.fromkeys(others, 0.0), dict.fromkeys(others, b"")
        before = time.monotonic()
        while not done.wait(pause):
            now = time.monotonic()
            # If this process itself was held up, that does not count against the others.
            passed, before = min(now - before, 2 * pause), now
            for rank in others:
                sign = heard.get(rank, b"")
                fresh = sign != last[rank] or sign == _LEFT
                silent[rank], last[rank] = 0.0 if fresh else silent[rank] + passed, sign
            gone = [rank for rank in others if silent[rank] > limit]
            if told or gone:
                reason = told[0] if told else _reason(gone, ranks, limit)
                if own == 0:
                    say = threading.Thread(target=_tell, args=(store, reason), daemon=True)
                    say.start()
                    say.join(pause)  # do not wait for a store that hangs
                text = f"{reason}; rank {own} on {ranks[own].host} was {whereabouts()}; {_RESUME}"
                (end or _end)(text)
                return

    threads = [
        threading.Thread(target=run, name=f"{run.__name__}-alive", daemon=True)
        for run in (talk, listen)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    except SystemExit:
        _leave(store, own, done)
        raise
    else:
        _leave(store, own, done)
    finally:
        done.set()


def lost_connection(error: RuntimeError, own: int, host: str) -> TrainingError | None:
    """An error of a collective in one line if the other side is lost; else None."""
    text = str(error)
    of_collective = isinstance(error, dist.DistError) or "gloo" in text
    if isinstance(error, RL2Error) or not of_collective:
        return None
    if not any(words in text for words in _CONNECTION):
        return None
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return TrainingError(
        f"rank {own} on {host} lost another rank while it was {_place(frames)} "
        f"({first_line(error)}); that rank's output has the reason; {_RESUME}"
    )


def whereabouts() -> str:
    """What the main thread is doing: the line of this library, and the step."""
    frames = []
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        frames.insert(0, (frame, frame.f_lineno))
        frame = frame.f_back
    return _place(frames)


def _place(frames: list[tuple[FrameType, int]]) -> str:
    """frames: frames with their line numbers, the outermost first."""
    ours = [
        (frame, line)
        for frame, line in frames
        if frame.f_code.co_filename.startswith(_PACKAGE)
        and frame.f_code.co_filename != __file__
        and frame.f_code.co_name not in ("run", "main", "<module>")
    ]
    if not ours:
        return "starting"
    frame, line = ours[-1]
    steps = [outer.f_locals.get("step") for outer, _ in ours]
    step = next((f" of step {step}" for step in steps if isinstance(step, int)), "")
    file = os.path.relpath(frame.f_code.co_filename, os.path.dirname(_PACKAGE.rstrip(os.sep)))
    return f"in {frame.f_code.co_name}{step} ({file}:{line})"


def _reason(gone: list[int], ranks: list[Rank], limit: float) -> str:
    names = ", ".join(f"rank {rank} on {ranks[rank].host}" for rank in gone[:8])
    more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
    return (
        f"no sign of life from {names}{more} for {limit:g} s (trainer.rank_timeout): it was "
        "stopped, or its network connection is lost"
    )


def _tell(store: dist.Store, reason: str) -> None:
    with suppress(dist.DistError, RuntimeError):
        store.set("lost", reason)


def _leave(store: dist.Store, own: int, done: threading.Event) -> None:
    """Tell the others not to wait for this rank any more, without waiting for long."""
    done.set()

    def say() -> None:
        with suppress(dist.DistError, RuntimeError):
            store.set(f"alive/{own}", _LEFT.decode())

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    thread.join(5.0)


def _end(reason: str) -> None:
    """End this process, as signals do not reach its waiting main thread."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_AFTER_THE_FIRST)
    logger.error("TrainingError: %s", reason)
    os._exit(1)
