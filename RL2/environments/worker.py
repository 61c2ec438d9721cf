"""Runs the functions of an environment file: in the trainer's process, or as a process of its own.

    python worker.py <number of the socket> <number of the pulse's file> <environment file>

The process is started by the path of this file and imports nothing but the standard library and
what the environment does, so that it is there at once. It makes the calls that come in over the
socket, many at a time, on an event loop in its main thread (where SIGALRM works), and checks the
answers before it sends them. What it writes down in the pulse, which is memory that it shares with
the trainer, tells which call was being executed when it stops to move.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import importlib.util
import inspect
import io
import json
import math
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from numbers import Real
from types import ModuleType
from typing import Any

# Bytes of a text or of an extra_info (pickled) that an environment may return: what the trainer's
# event loop handles well within 100 ms.
MAX_ANSWER = 4 * 2**20
# Rewards are trained on in float32: what is beyond it would make all of a step infinite.
LARGEST = (2 - 2.0**-23) * 2.0**127
TOO_LARGE = f"too large: beyond {LARGEST:.2g}, the largest float32"
_MAX_MESSAGE = 500  # characters of somebody else's text in an error
_MOST_UNKNOWN = 8  # keys of an answer that are named
_TICKS = 8  # parts of a time limit
_MAX_FRAME = 2**31  # bytes; the trainer sends what it has, a worker never more than two answers
_LENGTH = struct.Struct("!I")
_FOR_THE_TRAINER = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "PWR")

# Keys of what `step` answers: those that it has to have, and all.
NEEDED = ("reward", "score", "done")
GIVES = ("next_state", *NEEDED, "extra_info")
_TAKES = {"step": ("state", "action", "extra_info"), "reset": ("extra_info",)}

Functions = dict[str, Callable[..., Awaitable[Any]]]
# Text (the state to go on with), numbers by name, extra_info, and keys that nobody knows.
Answer = tuple[str | None, dict[str, float | bool], Any, tuple[str, ...]]


class Failed(Exception):
    """The file cannot be used, or a call failed; the text says why."""


# ------------------------------------------------------------------------ functions


def load(path: str, source: bytes) -> Functions:
    """`step` and `reset` (where there is one) of an environment file whose text is `source`.

    Raises Failed.
    """
    # Two files of one name must not share a module.
    digest = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:8]
    name = f"rl2_environment_{os.path.splitext(os.path.basename(path))[0]}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise Failed("not a Python file; give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        # Not by the loader: a file that is edited during a run must not change what it rewards.
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
        step, reset = getattr(module, "step", None), getattr(module, "reset", None)
    except BaseException as error:  # exit() and what else a file may raise, or define
        del sys.modules[name]
        raise Failed(f"cannot import: {describe(error)}") from error
    if not inspect.iscoroutinefunction(step):
        raise Failed("must define `async def step(state, action, extra_info)`")
    _check_signature("step", step)
    if reset is None:
        return {"step": _told(step)}
    if not inspect.iscoroutinefunction(reset):
        raise Failed("`reset` must be `async def`")
    _check_signature("reset", reset)
    return {"step": _told(step), "reset": reset}


def _told(step: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`step` as it is called here, with the finish reason, which it is told if it names it."""
    if "finish_reason" not in inspect.signature(step).parameters:
        return lambda state, action, finish_reason, extra_info: step(state, action, extra_info)
    return lambda state, action, finish_reason, extra_info: step(
        state, action, extra_info, finish_reason=finish_reason
    )


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
        named = {"finish_reason"} & signature.parameters.keys() if name == "step" else ()
        signature.bind(*_TAKES[name], **dict.fromkeys(named))
    except ValueError:
        return  # there is none to be had
    except TypeError as error:
        raise Failed(
            f"is called as {name}({', '.join(_TAKES[name])}), but defines {name}{signature}; "
            "let it take these arguments, in this order"
        ) from error


async def call(functions: Functions, name: str, arguments: tuple, timeout: float) -> Answer:
    """Call `step` or `reset`, for `timeout` seconds at most, and check what it answers.

    The seconds count from when the call begins, and not while something blocks the event loop.
    Raises Failed, whatever the environment does: one that will not be cancelled is left behind.
    """
    if name not in functions:
        raise Failed("a row has no prompt and the file defines no `async def reset`")
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Answer | Failed] = loop.create_future()

    def settle(result: Answer | Failed) -> None:
        if not outcome.done():
            outcome.set_result(result)

    limit: asyncio.TimerHandle | None = None

    def tick(n_left: int) -> None:
        nonlocal limit
        if n_left:  # being late, as the loop was held up, does not count
            limit = loop.call_later(timeout / _TICKS, tick, n_left - 1)
        else:
            settle(Failed(f"timed out after {timeout:g} s"))

    async def run() -> None:
        tick(_TICKS)
        try:
            answer = await functions[name](*arguments)
        except GeneratorExit:
            raise
        except BaseException as error:  # a task that raises SystemExit would end the event loop
            settle(Failed(f"raised {describe(error)}"))
            return
        finally:
            limit.cancel()
        try:
            check = _checked_step if name == "step" else _checked_reset
            settle(check(answer, arguments[-1]))
        except Failed as error:
            settle(error)
        except Exception as error:  # a number too large for a float, a `__repr__` that raises
            settle(Failed(f"returned what cannot be checked: {describe(error)}"))

    # A task of its own, so that an environment which cancels itself is not taken for us.
    task = loop.create_task(run())
    try:
        result = await outcome
    finally:
        task.cancel()  # without effect on one that has ended
    if isinstance(result, Failed):
        raise result
    return result


def describe(error: BaseException) -> str:
    """Type and text of an error, short and in one line, with the last line of the environment that
    it went through, and the place that this led to."""
    try:
        text = str(error)[:_MAX_MESSAGE]
    except Exception:
        text = "(its text cannot be had)"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    said = f"{type(error).__name__}: {text}".removesuffix(": ")
    places = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    places = [place for place in places if place[0] != describe.__code__.co_filename]
    if not places:
        return said
    # The first file that is not ours is the environment's.
    own = [place for place in places if place[0] == places[0][0]]
    shown = [
        f"{os.path.basename(file)}:{line}" for file, line in dict.fromkeys((own[-1], places[-1]))
    ]
    return f"{said} ({', in '.join(shown)})"


def _checked_step(answer: Any, extra_info: Any) -> Answer:
    if not isinstance(answer, dict):
        raise Failed(f"returned {type(answer).__name__}, not a dict with {', '.join(NEEDED)}")
    unknown = tuple(f"{key!r:.80}" for key in answer if key not in GIVES)[:_MOST_UNKNOWN]
    try:
        return _known_keys(answer, extra_info, unknown)
    except Failed as error:
        also = f"; it has the unknown {', '.join(unknown)}" if unknown else ""
        raise Failed(f"{error}{also}") from error


def _known_keys(answer: dict, extra_info: Any, unknown: tuple[str, ...]) -> Answer:
    missing = {*NEEDED} - answer.keys()
    if missing:
        raise Failed(f"the returned dict lacks {', '.join(sorted(missing))}")
    numbers = {key: _finite(key, answer[key]) for key in ("reward", "score")}
    done = _scalar(answer["done"])
    if not isinstance(done, bool):
        raise Failed(f"done={done!r:.80} is not a bool")
    text = answer.get("next_state")
    if not (isinstance(text, str) or (done and text is None)):
        raise Failed(f"next_state={text!r:.80} is not a str")
    extra_info = _checked_extra_info(answer.get("extra_info", extra_info))
    text = text if text is None else _text("next_state", text)
    return text, numbers | {"done": done}, extra_info, unknown


def _checked_reset(answer: Any, extra_info: Any) -> Answer:
    text, extra_info = answer if isinstance(answer, tuple) else (answer, extra_info)
    if not isinstance(text, str) or not text:
        raise Failed(f"returned {text!r:.80}, not a non-empty str")
    return _text("the state", text), {}, _checked_extra_info(extra_info), ()


def _checked_extra_info(extra_info: Any) -> dict[str, Any]:
    if not isinstance(extra_info, dict):
        raise Failed(f"extra_info is {type(extra_info).__name__}, not a dict")
    return extra_info


def _text(name: str, text: str) -> str:
    """A plain str, of a subclass as well."""
    try:
        encoded = str.encode(text) if str.__len__(text) <= MAX_ANSWER else b"." * (MAX_ANSWER + 1)
    except UnicodeEncodeError as error:
        raise Failed(f"{name} is no text that can be encoded: {error}") from error
    if len(encoded) > MAX_ANSWER:
        raise Failed(f"{name} is longer than {MAX_ANSWER} bytes")
    return encoded.decode()


def _finite(key: str, value: Any) -> float:
    number = _scalar(value)
    if not isinstance(number, Real):
        raise Failed(f"{key}={value!r:.80} is not a number")
    try:
        number = float(number)
    except OverflowError:  # an int or a fraction, which may have more digits than can be shown
        raise Failed(f"{key} is {TOO_LARGE}") from None
    if not math.isfinite(number):
        raise Failed(f"{key}={number} is not finite")
    if abs(number) > LARGEST:
        raise Failed(f"{key}={number:g} is {TOO_LARGE}")
    return number


def _scalar(value: Any) -> Any:
    """The Python value of a numpy or torch scalar; anything else as it is."""
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


# ------------------------------------------------------------------------ what goes over the socket


def frame(head: dict[str, Any], *bodies: bytes) -> bytes:
    """A message: a head that JSON can hold, and bytes. Nobody unpickles the head."""
    parts = (json.dumps(head | {"bodies": len(bodies)}).encode(), *bodies)
    content = b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))
    return _LENGTH.pack(len(content)) + content


async def receive(
    reader: asyncio.StreamReader, limit: int = _MAX_FRAME
) -> tuple[dict[str, Any], list[bytes]]:
    """Head and bodies of the next message. Raises EOFError, OSError, or ValueError for what is no
    message or longer than `limit`."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > limit:
        raise ValueError(f"a message of {length} bytes")
    return parts_of(await reader.readexactly(length))


def parts_of(content: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Head and bodies of a message without its length. Raises ValueError."""
    parts, at = [], 0
    while at < len(content):
        try:
            (length,) = _LENGTH.unpack_from(content, at)
        except struct.error as error:
            raise ValueError("a message that ends too early") from error
        at += _LENGTH.size
        parts.append(content[at : at + length])
        at += length
    head = json.loads(parts[0]) if parts else None
    if not isinstance(head, dict) or head.get("bodies") != len(parts) - 1 or at != len(content):
        raise ValueError("not a message")
    return head, parts[1:]


def sealed(extra_info: dict[str, Any]) -> bytes:
    """An extra_info, pickled: the trainer hands it on as it is. Raises Failed."""
    buffer = _Bounded()
    try:
        pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(extra_info)
    except Failed:
        raise
    except Exception as error:
        raise Failed(
            f"extra_info cannot go to another process ({describe(error)}); put plain data in it, "
            "or use rollout.env_workers=0"
        ) from error
    return buffer.getvalue()


def unsealed(data: bytes) -> dict[str, Any]:
    """What `sealed` was given. Raises Failed."""
    try:
        return pickle.loads(data)
    except Exception as error:
        raise Failed(f"extra_info cannot be unpickled: {describe(error)}") from error


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > MAX_ANSWER:
            raise Failed(f"extra_info is longer than {MAX_ANSWER} bytes (pickled)")
        return super().write(data)


# ------------------------------------------------------------------------ pulse


class Pulse:
    """What a worker was doing last, in memory that the trainer reads.

    beats: changes as long as the process moves. call: number of the call whose code is being
    executed, 0 while none is. begun: the last call that was begun. threads: whether threads of the
    environment ran beside it then, which may be what stopped the process.
    """

    _FIELDS = struct.Struct("=QQQQ")
    SIZE = _FIELDS.size

    def __init__(self, memory: mmap.mmap):
        self._memory = memory
        self.beats = self.call = self.begun = self.threads = 0

    def read(self) -> tuple[int, int, int, bool]:
        """beats, call, begun, threads as the other process wrote them."""
        *numbers, threads = self._FIELDS.unpack_from(self._memory)
        return *numbers, bool(threads)

    def enter(self, call: int) -> int:
        """The code of a call is executed from here on (0: none); returns which was before."""
        before, self.call = self.call, call
        if call > self.begun:
            self.begun = call
        self.threads = threading.active_count() > 1
        self.beat()
        return before

    def beat(self) -> None:
        self.beats += 1
        self._FIELDS.pack_into(self._memory, 0, self.beats, self.call, self.begun, self.threads)

    def close(self) -> None:
        self._memory.close()


_CALL: contextvars.ContextVar[int] = contextvars.ContextVar("call", default=0)


class _Traced(Coroutine):
    """A coroutine that notes in the pulse for which call it is executed, at each of its steps.

    All tasks of the event loop are such ones, those that an environment makes itself as well: they
    inherit the number of the call that made them.
    """

    def __init__(self, coroutine: Coroutine, pulse: Pulse):
        self._coroutine, self._pulse = coroutine, pulse

    def send(self, value: Any) -> Any:
        before = self._pulse.enter(_CALL.get())
        try:
            return self._coroutine.send(value)
        finally:
            self._pulse.enter(before)

    def throw(self, *error: Any) -> Any:
        before = self._pulse.enter(_CALL.get())
        try:
            return self._coroutine.throw(*error)
        finally:
            self._pulse.enter(before)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()


# ------------------------------------------------------------------------ process


async def _answer(
    functions: Functions, timeout: float, head: dict[str, Any], bodies: list[bytes]
) -> bytes:
    """The message that answers a call."""
    number = head["number"]
    try:
        *texts, extra_info = bodies
        texts = [text.decode("utf-8", "surrogatepass") for text in texts]
        arguments = (*texts, unsealed(extra_info))
        answer = await call(functions, head["name"], arguments, timeout)
        text, numbers, extra_info, unknown = answer
        body = sealed(extra_info)
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
            _Traced(coroutine, pulse), loop=loop, **options
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
        if "name" not in head:  # nobody waits for it any more
            if number in tasks:
                tasks[number].cancel()
            continue
        before()
        context = contextvars.copy_context()
        context.run(_CALL.set, number)
        tasks[number] = loop.create_task(answer(head, bodies), context=context)


def greeting(connection: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """The first message on a connection, without asyncio. Raises EOFError, OSError, ValueError."""

    def read(n: int) -> bytes:
        data = b""
        while len(data) < n:
            more = connection.recv(n - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    return parts_of(read(length))


def _ours(*path: str) -> ModuleType:
    """A module of RL2 by its file, relative to this one, without the packages around it."""
    file = os.path.join(os.path.dirname(__file__), *path)
    name = f"rl2_{os.path.splitext(path[-1])[0]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(connection: int, memory: int, path: str) -> None:
    # The trainer ends its workers; a signal for all processes of a job is for the trainer. Not
    # SIG_IGN, which what the environment starts would inherit.
    for name in _FOR_THE_TRAINER:
        if number := getattr(signal, f"SIG{name}", None):
            signal.signal(number, lambda *_: None)
    streams, modules = _ours(os.pardir, "runtime", "streams.py"), _ours("modules.py")
    streams.keep_streams()  # what cannot be printed is no fault of a call
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # a process that is killed has said what it said
    try:  # where memory runs out, it is not the trainer that has to go
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
        sock, pulse, functions, head["timeout"], head["beat"], streams.look_after_streams
    )
    loop.run_until_complete(serve)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except (EOFError, ConnectionError):
        # The trainer is gone. This process ends and what the environment has started there,
        # whatever they are doing.
        os.killpg(os.getpid(), signal.SIGKILL)
    except BaseException:  # of a task that the environment left alone
        traceback.print_exc()
    os._exit(1)  # threads of the environment shall not keep us
