"""The functions of an environment file: how they are loaded and called, and what they may answer.

Standard library only: environment processes import this module, and must start fast.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from numbers import Real
from typing import Any

# Most bytes of a text or a pickled extra_info that an environment may return: the trainer's event
# loop handles these well within 100 ms.
MAX_ANSWER = 4 * 2**20
# Rewards become float32: a larger one would make a whole step infinite.
LARGEST = (2 - 2.0**-23) * 2.0**127
TOO_LARGE = f"too large: beyond {LARGEST:.2g}, the largest float32"
_MAX_MESSAGE = 500  # characters of an error's text that are shown
_MOST_UNKNOWN = 8  # unknown keys of an answer that are shown
_TICKS = 8  # parts of a time limit

# Keys of an answer of `step`: the required ones, and all but the dict SEVERAL; where that is, the
# first required one may be missing.
NEEDED = ("reward", "score", "done")
GIVES = ("next_state", *NEEDED, "extra_info")
SEVERAL = "rewards"
_TAKES = {"step": ("state", "action", "extra_info"), "reset": ("extra_info",)}

Functions = dict[str, Callable[..., Awaitable[Any]]]
# Text (the next state), numbers by name, extra_info, unknown keys.
Answer = tuple[str | None, dict[str, Any], Any, tuple[str, ...]]


class Failed(Exception):
    """The file cannot be used, or a call failed; the text says why."""


def load(path: str, source: bytes) -> Functions:
    """`step` and `reset` (if there is one) of an environment file whose text is `source`.

    Raises Failed.
    """
    # Two files with the same name must not share a module.
    digest = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:8]
    name = f"rl2_environment_{os.path.splitext(os.path.basename(path))[0]}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise Failed("not a Python file; give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up by name
    try:
        # Not by the loader: edits to the file during a run must not change the rewards.
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
        step, reset = getattr(module, "step", None), getattr(module, "reset", None)
    except BaseException as error:  # exit(), and anything else that the file may raise
        del sys.modules[name]
        raise Failed(f"cannot import: {describe(error)}") from error
    if not inspect.iscoroutinefunction(step):
        raise Failed("must define `async def step(state, action, extra_info)`")
    _check_signature("step", step)
    if reset is None:
        return {"step": _with_finish_reason(step)}
    if not inspect.iscoroutinefunction(reset):
        raise Failed("`reset` must be `async def`")
    _check_signature("reset", reset)
    return {"step": _with_finish_reason(step), "reset": reset}


def _with_finish_reason(step: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`step` with an argument `finish_reason`, which is dropped if the user's `step` has none."""
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
        return  # it has no signature
    except TypeError as error:
        raise Failed(
            f"is called as {name}({', '.join(_TAKES[name])}), but defines {name}{signature}; "
            "let it take these arguments, in this order"
        ) from error


async def call(functions: Functions, name: str, arguments: tuple, timeout: float) -> Answer:
    """Call `step` or `reset`, for at most `timeout` seconds, and check the answer.

    The time starts when the call begins, and stops while something blocks the event loop. Raises
    Failed in any case: a call that cannot be cancelled is abandoned.
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
        if n_left:  # in parts, so that a blocked loop costs at most one of them
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
            settle(Failed(f"returned a value that cannot be checked: {describe(error)}"))

    # A separate task, so that an environment that cancels its own task does not cancel ours.
    task = loop.create_task(run())
    try:
        result = await outcome
    finally:
        task.cancel()  # no effect if it has ended
    if isinstance(result, Failed):
        raise result
    return result


def describe(error: BaseException) -> str:
    """Type and text of an error in one short line, with the last line of the environment that it
    passed through, and the place where it was raised."""
    try:
        text = str(error)[:_MAX_MESSAGE]
    except Exception:
        text = "(its text cannot be read)"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    said = f"{type(error).__name__}: {text}".removesuffix(": ")
    places = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    ours = os.path.dirname(describe.__code__.co_filename)
    places = [place for place in places if os.path.dirname(place[0]) != ours]
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
    several = isinstance(answer.get(SEVERAL), dict)
    gives = (*GIVES, SEVERAL) if several else GIVES
    unknown = tuple(f"{key!r:.80}" for key in answer if key not in gives)[:_MOST_UNKNOWN]
    try:
        return _known_keys(answer, several, extra_info, unknown)
    except Failed as error:
        also = f"; unknown keys: {', '.join(unknown)}" if unknown else ""
        raise Failed(f"{error}{also}") from error


def _known_keys(answer: dict, several: bool, extra_info: Any, unknown: tuple[str, ...]) -> Answer:
    missing = {*NEEDED[several:]} - answer.keys()
    if missing:
        raise Failed(f"the returned dict lacks {', '.join(sorted(missing))}")
    numbers = {key: _finite(key, answer[key]) for key in ("reward", "score") if key in answer}
    if several:
        numbers[SEVERAL] = _rewards(answer[SEVERAL])
    done = _scalar(answer["done"])
    if not isinstance(done, bool):
        raise Failed(f"done={done!r:.80} is not a bool")
    text = answer.get("next_state")
    if not (isinstance(text, str) or (done and text is None)):
        raise Failed(f"next_state={text!r:.80} is not a str")
    extra_info = _checked_extra_info(answer.get("extra_info", extra_info))
    text = text if text is None else _text("next_state", text)
    return text, numbers | {"done": done}, extra_info, unknown


def _rewards(rewards: dict) -> dict[str, float]:
    if not all(isinstance(name, str) for name in rewards):
        raise Failed(f"rewards={rewards!r:.80} is not a dict of numbers by name")
    return {str(name): _finite(f"rewards[{name!r:.80}]", x) for name, x in rewards.items()}


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
    """`text` as a plain str, even if it is of a subclass."""
    try:
        encoded = str.encode(text) if str.__len__(text) <= MAX_ANSWER else b"." * (MAX_ANSWER + 1)
    except UnicodeEncodeError as error:
        raise Failed(f"{name} cannot be encoded: {error}") from error
    if len(encoded) > MAX_ANSWER:
        raise Failed(f"{name} is longer than {MAX_ANSWER} bytes")
    return encoded.decode()


def _finite(key: str, value: Any) -> float:
    number = _scalar(value)
    if not isinstance(number, Real):
        raise Failed(f"{key}={value!r:.80} is not a number")
    try:
        number = float(number)
    except OverflowError:  # an int or a fraction, possibly too long to show
        raise Failed(f"{key} is {TOO_LARGE}") from None
    if not math.isfinite(number):
        raise Failed(f"{key}={number} is not finite")
    if abs(number) > LARGEST:
        raise Failed(f"{key}={number:g} is {TOO_LARGE}")
    return number


def _scalar(value: Any) -> Any:
    """The Python value of a numpy or torch scalar; other values unchanged."""
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value
