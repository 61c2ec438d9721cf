"""Environments: a Python file with `async def step`, loaded by path, and checked at every call."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from RL2.config.errors import ConfigError, EnvError


@dataclass(frozen=True)
class Step:
    """What `step` answered, checked.

    next_state: text that the policy sees next; None when `done`.
    reward, score: finite floats; the reward is trained on, the score is reported.
    done: whether the sample ends here.
    extra_info: what the next `step` gets.
    """

    next_state: str | None
    reward: float
    score: float
    done: bool
    extra_info: dict[str, Any]


class Environment:
    """The environment functions of one file, with a time limit and checks.

    `step(state, action, extra_info)` must return a dict with `next_state` (str; may be missing or
    None when done), `reward` and `score` (finite numbers), `done` (bool), and `extra_info` (dict;
    when missing, the one passed in goes on).
    `reset(extra_info)`, needed only where rows have no prompt, must return the first state (str)
    or a pair of it and a dict.

    The time limit interrupts at an `await`. An environment that blocks instead holds up all the
    others; it should wrap the blocking call in `await asyncio.to_thread(…)`. When it comes back
    too late the call fails all the same.
    """

    def __init__(
        self,
        path: str,
        step: Callable[..., Awaitable[Any]],
        reset: Callable[..., Awaitable[Any]] | None,
        timeout: float,
    ):
        self.path = path
        self._step = step
        self._reset = reset
        self.timeout = timeout

    async def step(self, state: str, action: str, extra_info: dict[str, Any]) -> Step:
        """Judge an action. Raises EnvError naming the file and what was wrong."""
        answer = await self._call("step", self._step, state, action, extra_info)
        if not isinstance(answer, dict):
            raise self._error("step", f"returned {type(answer).__name__}, not a dict")
        missing = {"reward", "score", "done"} - answer.keys()
        if missing:
            raise self._error("step", f"the returned dict lacks {', '.join(sorted(missing))}")
        reward = self._finite("reward", answer["reward"])
        score = self._finite("score", answer["score"])
        done = _scalar(answer["done"])
        if not isinstance(done, bool):
            raise self._error("step", f"done={done!r:.80} is not a bool")
        next_state = answer.get("next_state")
        if not (isinstance(next_state, str) or (done and next_state is None)):
            raise self._error("step", f"next_state={next_state!r:.80} is not a str")
        extra_info = answer.get("extra_info", extra_info)
        if not isinstance(extra_info, dict):
            raise self._error("step", f"extra_info is {type(extra_info).__name__}, not a dict")
        return Step(next_state, reward, score, done, extra_info)

    async def reset(self, extra_info: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """First state and extra_info of a sample without a prompt. Raises EnvError."""
        if self._reset is None:
            raise self._error(
                "reset", "a row has no prompt and the file defines no `async def reset`"
            )
        answer = await self._call("reset", self._reset, extra_info)
        state, extra_info = answer if isinstance(answer, tuple) else (answer, extra_info)
        if not isinstance(state, str) or not state:
            raise self._error("reset", f"returned {state!r:.80}, not a non-empty str")
        if not isinstance(extra_info, dict):
            raise self._error("reset", f"extra_info is {type(extra_info).__name__}, not a dict")
        return state, extra_info

    async def _call(self, name: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout) as limit:
                answer = await function(*args)
        except Exception as error:
            if limit.expired():
                raise self._error(name, f"timed out after {self.timeout:g} s") from error
            raise self._error(name, f"raised {type(error).__name__}: {error}") from error
        elapsed = time.monotonic() - start
        if elapsed > self.timeout:
            raise self._error(
                name,
                f"took {elapsed:.1f} s without awaiting, over the limit of {self.timeout:g} s; "
                "wrap blocking calls in `await asyncio.to_thread(…)`",
            )
        return answer

    def _finite(self, key: str, value: Any) -> float:
        number = _scalar(value)
        if not isinstance(number, Real):
            raise self._error("step", f"{key}={value!r:.80} is not a number")
        if not math.isfinite(number):
            raise self._error("step", f"{key}={number} is not finite")
        return float(number)

    def _error(self, name: str, what: str) -> EnvError:
        return EnvError(f"{self.path}: {name} {what}")


def _scalar(value: Any) -> Any:
    """The Python value of a numpy or torch scalar; anything else as it is."""
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


def load_environment(path: str | Path, timeout: float = 60.0) -> Environment:
    """Load the environment file at `path`; `timeout` (seconds) bounds each call.

    Raises ConfigError naming `rollout.env_path` when the file is missing, cannot be imported, or
    has no `async def step`.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"rollout.env_path={path}: no such file; give the path of a .py file")
    # Two files of one name must not share a module.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"rl2_environment_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"rollout.env_path={path}: not a Python file; give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(
            f"rollout.env_path={path}: cannot import: {type(error).__name__}: {error}"
        ) from error
    step, reset = getattr(module, "step", None), getattr(module, "reset", None)
    if not inspect.iscoroutinefunction(step):
        raise ConfigError(
            f"rollout.env_path={path}: must define `async def step(state, action, extra_info)`"
        )
    if reset is not None and not inspect.iscoroutinefunction(reset):
        raise ConfigError(f"rollout.env_path={path}: `reset` must be `async def`")
    return Environment(str(path), step, reset, timeout)
