"""Environments in separate processes, which may hang, crash or be killed.

All calls of a sample go to one process, as long as it lives. If a process is killed, or ends by
itself, only the call at fault fails; the others are repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from RL2.environments import messages, output, worker
from RL2.environments.calls import MAX_ANSWER, Answer, Failed
from RL2.environments.pulse import Pulse
from RL2.runtime import guard

logger = logging.getLogger(__name__)

# Seconds beyond the time limit of a call after which a process without progress is killed.
_MARGIN = 1.0
_POLL = 0.25  # seconds between two checks of a process, and between its beats
_IMPORT_SECONDS = 60.0  # least time for the import of the file; the limit of a call may be longer
_OUTPUT_SECONDS = 1.0  # to pass on remaining output, for all processes together
_END_SECONDS = 10.0  # that a killed process may take to end, e.g. while it waits for a disk
_REPEATS = 3  # tries of a call that is lost by the fault of others, before it runs alone
_MOST_PROCESSES = 8


@dataclass(eq=False)
class _Lost(Exception):
    """The process of a call is gone. guilty: whether the call is the cause. suspect: whether it may
    be the cause."""

    reason: str
    guilty: bool = False
    suspect: bool = False


def default_processes() -> int:
    """The number of CPU cores for this rank, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_PROCESSES, (cores or 1) // ranks))


class Processes:
    """Up to `n` processes that run the environment file at `path`. The first is started here, the
    others when they get a call. Use the methods on one event loop.

    timeout: seconds for one call.

    Raises Failed if the file cannot be used.
    """

    def __init__(self, path: str, timeout: float, n: int):
        self.timeout = timeout
        self.n = n
        self._launch = _Launcher(path, Path(path).read_bytes(), timeout)
        # Ends the processes even if `close` is never called.
        self._end = weakref.finalize(self, self._launch.end)
        self._first: _Process | None = self._launch()
        self._workers: dict[int, asyncio.Task[_Worker]] = {}
        self._alone = asyncio.Semaphore(n)

    async def call(self, key: int, name: str, texts: tuple[str, ...], extra_info: Any) -> Answer:
        """The checked answer of `step` or `reset`; its extra_info is bytes for the next call.

        key: chooses the process. extra_info: a dict, or the bytes of an earlier call.

        Raises Failed.
        """
        if not isinstance(extra_info, bytes):
            extra_info = messages.pickled(extra_info)
        bodies = (*(text.encode("utf-8", "surrogatepass") for text in texts), extra_info)
        for _ in range(_REPEATS):
            try:
                return await (await self._worker(key % self.n)).call(name, bodies)
            except _Lost as lost:
                if lost.guilty:
                    raise Failed(lost.reason) from lost
                if lost.suspect:
                    break
        async with self._alone:
            process = await self._start()
            try:
                return await process.call(name, bodies)
            except _Lost as lost:
                raise Failed(lost.reason) from lost
            finally:
                await process.close()

    async def close(self) -> None:
        """End all processes, even busy ones. Later calls raise Failed."""
        starts = list(self._workers.values())
        await asyncio.to_thread(self._end)
        if self._first is not None:
            self._first.close()
        for started in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(started, _Worker):
                await started.close()

    async def _worker(self, slot: int) -> _Worker:
        """The running process of a slot; starts one if there is none."""
        start = self._workers.get(slot)
        if start is None or start.done() and (start.exception() or start.result().ended):
            start = self._workers[slot] = asyncio.create_task(self._start())
        return await asyncio.shield(start)  # other calls may wait for it

    async def _start(self) -> _Worker:
        process, self._first = self._first, None
        if process is None:
            process = await asyncio.to_thread(self._launch)
        started = _Worker(process, self.timeout)
        await started.connect()
        return started


class _Worker:
    """The calls to one process, on the event loop."""

    def __init__(self, process: _Process, timeout: float):
        self._process = process
        self._timeout = timeout
        self._calls: dict[int, asyncio.Future] = {}
        self._n_calls = 0
        self._stuck = False
        self.ended = False

    async def connect(self) -> None:
        reader, self._writer = await asyncio.open_connection(
            sock=self._process.connection, limit=2**20
        )
        self._serving = asyncio.create_task(self._serve(reader))

    async def call(self, name: str, bodies: tuple[bytes, ...]) -> Answer:
        """Raises Failed, and _Lost if the process ends before it answers."""
        if self.ended:
            raise _Lost("its process ended")
        self._n_calls = number = self._n_calls + 1
        self._calls[number] = future = asyncio.get_running_loop().create_future()
        self._writer.write(messages.frame({"number": number, "name": name}, *bodies))
        try:
            head, bodies = await future
        except asyncio.CancelledError:
            if not self.ended:
                self._writer.write(messages.frame({"number": number}))
            raise
        finally:
            del self._calls[number]
        if "error" in head:
            raise Failed(head["error"])
        text, extra_info = bodies
        text = text.decode() if head["text"] else None
        return text, head["numbers"], extra_info, tuple(head["unknown"])

    async def close(self) -> None:
        """Kill the process and wait until it is gone."""
        await asyncio.to_thread(self._process.end)
        await self._serving

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        """Deliver answers to the waiting calls, until the process has ended."""
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                head, bodies = await messages.receive(reader, limit=2 * MAX_ANSWER + 2**16)
                future = self._calls.get(head["number"])
                if future is not None and not future.done():
                    future.set_result((head, bodies))
        except (EOFError, OSError):
            pass
        except Exception as error:  # the environment wrote into our connection
            logger.warning("environment process %d: %s", self._process.pid, error)
        finally:
            self.ended = True
            watch.cancel()
            self._writer.close()
        await self._lose()

    async def _lose(self) -> None:
        status = await asyncio.to_thread(self._process.end)
        _, executed, begun, threads = self._process.pulse.read()
        self._process.close()
        if self._stuck:
            reason = f"blocked for {self._timeout:g} s without awaiting; its process was killed"
        else:
            reason = f"its process ended ({_exit_text(status)})"
        if self._calls:
            logger.warning(
                "environment process %d ended (%s) with %d calls in flight",
                self._process.pid, _exit_text(status), len(self._calls),
            )  # fmt: skip
        # With threads, one of them may have blocked the process while a call was executed.
        known = executed and not threads
        for number, future in self._calls.items():
            suspect = number == executed if known else number <= begun
            if not future.done():
                future.set_exception(_Lost(reason, suspect and known and self._stuck, suspect))

    async def _watch(self) -> None:
        """Kill the process when it made no progress for longer than a call may take."""
        idle, last = 0.0, None
        while idle <= self._timeout + _MARGIN:
            before = time.monotonic()
            await asyncio.sleep(_POLL)
            pulse = self._process.pulse.read()
            # The process is not to blame if this loop, or the whole machine, was held up.
            idle = idle + min(time.monotonic() - before, 2 * _POLL) if pulse == last else 0.0
            last = pulse
        self._stuck = True
        await asyncio.to_thread(self._process.end)


def _exit_text(status: int | None) -> str:
    if status is None:
        return "it cannot be killed"
    if status >= 0:
        return f"exit code {status}"
    return "killed, or its connection closed" if status == -signal.SIGKILL else f"signal {-status}"


class _Launcher:
    """Starts processes and ends them. For use from any thread."""

    def __init__(self, path: str, source: bytes, timeout: float):
        self._path, self._source, self._timeout = path, source, timeout
        self._modules = b""  # what the first process has imported, see `modules`
        self._processes: set[_Process] = set()
        self._lock = threading.RLock()  # the garbage collector may call `end` anywhere
        self._ended = False
        self._pid = os.getpid()

    def __call__(self) -> _Process:
        """Start a process and have it import the file. Raises Failed."""
        with self._lock:
            if self._ended:
                raise Failed("not called: the environment is closed")
            try:
                process = _Process(self._path)
            except OSError as error:  # a limit on files or processes
                raise Failed(f"cannot be run: no process can be started ({error})") from error
            self._processes = {one for one in self._processes if not one.gone} | {process}
        try:
            self._modules = process.greet(self._source, self._modules, self._timeout)
        except BaseException:
            process.close()
            raise
        return process

    def end(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork of the trainer
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.ask()
            for process in self._processes:
                process.end()
            until = time.monotonic() + _OUTPUT_SECONDS
            for printed in (one for process in self._processes for one in process.printed):
                printed.join(max(0.0, until - time.monotonic()))


class _Process:
    """A process that runs an environment file, and its guard (`guard`): when one of them ends, so
    do the other and all processes that they have started."""

    def __init__(self, path: str):
        self._lock = threading.Lock()
        self.pid = 0  # set by `greet`
        with contextlib.ExitStack() as stack:
            self.connection, theirs = socket.socketpair()
            stack.enter_context(theirs)
            memory = stack.enter_context(
                open(os.memfd_create("rl2-pulse"), "w+b")
                if hasattr(os, "memfd_create")
                else tempfile.TemporaryFile()
            )
            memory.truncate(Pulse.SIZE)
            self.pulse = Pulse(mmap.mmap(memory.fileno(), Pulse.SIZE))
            passed = (theirs.fileno(), memory.fileno())
            files, self.printed = [], []
            for target in (1, 2):
                writes, thread = output.passed_on(target)
                stack.callback(os.close, writes)
                files.append(writes)
                self.printed.append(thread)
            control = f"--control={passed[0]},{passed[1]}"
            self._guard = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    guard.__file__,
                    str(os.getpid()),
                    control,
                    *worker.command(*passed, path),
                ],
                pass_fds=passed,
                stdin=subprocess.PIPE,
                stdout=files[0],
                stderr=files[1],
                bufsize=0,
                start_new_session=True,
            )

    @property
    def gone(self) -> bool:
        return self._guard.returncode is not None

    def greet(self, source: bytes, modules: bytes, timeout: float) -> bytes:
        """Have the process import the file, with the modules that the first process found (empty:
        this is the first). Returns these modules. Raises Failed."""
        seconds = max(_IMPORT_SECONDS, timeout)
        head = {"sys_path": sys.path, "timeout": timeout, "beat": _POLL}
        self.connection.settimeout(seconds)
        try:
            self.connection.sendall(messages.frame(head, source, modules))
            answer, bodies = messages.greeting(self.connection)
        except TimeoutError as error:
            raise Failed(f"cannot import: not done after {seconds:g} s") from error
        except (EOFError, OSError, ValueError) as error:
            raise Failed(f"cannot import: its process ended ({_exit_text(self.end())})") from error
        if "error" in answer:
            raise Failed(answer["error"])
        self.pid = answer["pid"]
        self.connection.setblocking(False)
        return bodies[0]

    def ask(self) -> None:
        """Have the guard kill it and all that it has started, without waiting."""
        if not self.gone:
            self._guard.send_signal(signal.SIGCONT)  # in case it was stopped
            with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, or is closed
                self._guard.stdin.write(b"end")

    def end(self) -> int | None:
        """Kill it and all that it has started; returns its exit status, None if it does not end."""
        with self._lock:
            if not self.gone:
                self.ask()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._guard.wait(_END_SECONDS)
            return self._guard.returncode

    def close(self) -> None:
        """As `end`, and close all files that belong to it."""
        self.end()
        self._guard.stdin.close()
        self.pulse.close()
        self.connection.close()
