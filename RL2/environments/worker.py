"""A process that runs the functions of an environment file for the trainer.

`command` starts it. To start fast, it imports only the standard library, a few files of RL2 that do
the same, and what the environment imports. It makes the calls that arrive on the socket, many at a
time, on an event loop in its main thread (where SIGALRM works), and checks the answers before it
sends them.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from RL2.environments import modules
from RL2.environments.calls import Failed, Functions, call, load
from RL2.environments.messages import frame, greeting, pickled, receive, unpickled
from RL2.environments.pulse import CURRENT_CALL, Pulse, Traced
from RL2.runtime import streams

_FOR_THE_TRAINER = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR")
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# The trainer's sys.path arrives later; RL2 may not be importable without it.
_START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from RL2.environments.worker import run
run()
"""


def command(connection: int, memory: int, path: str) -> list[str]:
    """The command line of the process. connection, memory: file descriptors of the socket and the
    pulse. path: the environment file."""
    return [sys.executable, "-P", "-c", _START, _ROOT, str(connection), str(memory), path]


async def _answer(
    functions: Functions, timeout: float, head: dict[str, Any], bodies: list[bytes]
) -> bytes:
    """The message that answers a call."""
    number = head["number"]
    try:
        *texts, extra_info = bodies
        texts = [text.decode("utf-8", "surrogatepass") for text in texts]
        arguments = (*texts, unpickled(extra_info))
        answer = await call(functions, head["name"], arguments, timeout)
        text, numbers, extra_info, unknown = answer
        body = pickled(extra_info)
    except Failed as error:
        return frame({"number": number, "error": str(error)})
    head = {"number": number, "numbers": numbers, "text": text is not None, "unknown": unknown}
    return frame(head, (text or "").encode(), body)


async def _serve(
    connection: socket.socket,
    pulse: Pulse,
    functions: Functions,
    timeout: float,
    beat: float,
    before: Callable[[], None],
) -> None:
    """Answer calls, each after `before`. Raises EOFError or OSError when the trainer has closed
    the connection."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(
        lambda loop, coroutine, **options: asyncio.Task(
            Traced(coroutine, pulse), loop=loop, **options
        )
    )
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**20)
    tasks: dict[int, asyncio.Task] = {}

    def beat_on() -> None:
        pulse.beat()
        loop.call_later(beat, beat_on)

    async def answer(head: dict[str, Any], bodies: list[bytes]) -> None:
        try:
            writer.write(await _answer(functions, timeout, head, bodies))
        finally:
            del tasks[head["number"]]

    beat_on()
    while True:
        head, bodies = await receive(reader)
        number = head["number"]
        if "name" not in head:  # the trainer no longer waits for this call
            if number in tasks:
                tasks[number].cancel()
            continue
        before()
        context = contextvars.copy_context()
        context.run(CURRENT_CALL.set, number)
        tasks[number] = loop.create_task(answer(head, bodies), context=context)


def main(connection: int, memory: int, path: str) -> None:
    # The trainer handles signals to all processes of a job, and ends its workers. Not SIG_IGN, as
    # child processes of the environment would inherit it.
    for name in _FOR_THE_TRAINER:
        if number := getattr(signal, f"SIG{name}", None):
            signal.signal(number, lambda *_: None)
    streams.keep_streams()  # a failed print must not fail a call
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # so that output is not lost in a kill
    try:  # when memory runs out, Linux should kill this process, not the trainer
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # not Linux
    pulse = Pulse(mmap.mmap(memory, Pulse.SIZE))
    os.close(memory)
    sock = socket.socket(fileno=connection)
    sock.set_inheritable(False)
    head, (source, remembered) = greeting(sock)
    sys.path[:] = head["sys_path"]
    sys.argv = [path]
    if remembered:
        sys.meta_path.insert(0, modules.Remembered(json.loads(remembered)))
    before = {*sys.modules}
    try:
        functions = load(path, source)
    except Failed as error:
        sock.sendall(frame({"error": str(error)}))
        return
    found = remembered or json.dumps(modules.imported_since(before)).encode()
    sock.sendall(frame({"pid": os.getpid()}, found))
    sock.setblocking(False)
    loop = asyncio.new_event_loop()
    serve = _serve(
        sock, pulse, functions, head["timeout"], head["beat"], streams.replace_broken_streams
    )
    loop.run_until_complete(serve)


def run() -> NoReturn:
    """Run until this process is killed or the trainer is gone."""
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except (EOFError, ConnectionError):
        # The trainer is gone: kill this process and all in its group.
        os.killpg(os.getpid(), signal.SIGKILL)
    except BaseException:  # from a task that the environment started and does not await
        traceback.print_exc()
    os._exit(1)  # without waiting for threads of the environment
