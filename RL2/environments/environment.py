"""Environments: a Python file with `async def step`, loaded by path, and checked at every call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from RL2.environments import calls
from RL2.environments.calls import Answer, Failed, Functions
from RL2.environments.messages import unpickled
from RL2.environments.processes import Processes, default_processes
from RL2.environments.source import fault_of_returns
from RL2.runtime.errors import ConfigError, EnvError
from RL2.runtime.user_code import Unfit, undisturbed


@dataclass(frozen=True)
class Step:
    """The checked answer of `step`.

    next_state: text that the policy sees next; None when `done`.
    reward, score: finite floats; the reward is trained on, the score is reported. The reward is
        None if there are `rewards` in place of it.
    done: whether the sample ends here.
    extra_info: passed to the next `step`; bytes if the environment runs in a separate process.
    rewards: several rewards by name; None if there is one.
    """

    next_state: str | None
    score: float
    done: bool
    extra_info: dict[str, Any] | bytes
    reward: float | None = None
    rewards: dict[str, float] | None = None


class Environment:
    """The environment functions of one file, with a time limit and checks.

    `step(state, action, extra_info)` must return a dict with `next_state` (str; may be missing or
    None when done), `reward` and `score` (finite numbers), `done` (bool), and `extra_info` (dict;
    when missing, the one passed in goes on). It may return `rewards`, a dict of finite numbers by
    name (`rollout.rewards` has their weights); `reward` is then their weighted sum if missing.
    If `step` has a parameter `finish_reason`, it gets the reason why the action ended: "stop" (an
    end token or a stop text) or "length" (the token limit of a turn).
    `reset(extra_info)`, needed only where rows have no prompt, must return the first state (str)
    or a pair of it and a dict.

    runs: what makes the calls: `Processes`, where a call may block, crash or hang, or `InProcess`.
        Use and close the environment on one event loop.
    """

    def __init__(self, path: str, runs: Processes | InProcess):
        self.path = path
        self._runs = runs
        self.unknown: dict[str, None] = {}  # unknown keys of answers, in order

    async def step(
        self,
        state: str,
        action: str,
        extra_info: dict[str, Any] | bytes,
        key: int = 0,
        finish_reason: str = "stop",
    ) -> Step:
        """Judge an action. Raises EnvError naming the file and what was wrong.

        key: calls with the same key go to the same process.
        """
        texts = (state, action, finish_reason)
        text, numbers, extra_info, unknown = await self._call(key, "step", texts, extra_info)
        self.unknown |= dict.fromkeys(unknown)
        return Step(text, extra_info=extra_info, **numbers)

    async def reset(
        self, extra_info: dict[str, Any], key: int = 0
    ) -> tuple[str, dict[str, Any] | bytes]:
        """First state and extra_info of a sample without a prompt. Raises EnvError."""
        text, _, extra_info, _ = await self._call(key, "reset", (), extra_info)
        return text, extra_info

    async def close(self) -> None:
        """End the environment's processes; it can no longer be used."""
        await self._runs.close()

    async def _call(
        self, key: int, name: str, texts: tuple[str, ...], extra_info: dict[str, Any] | bytes
    ) -> Answer:
        try:
            return await self._runs.call(key, name, texts, extra_info)
        except Failed as error:
            raise EnvError(f"{self.path}: {name} {error}") from error


class InProcess:
    """Makes calls on the caller's event loop. A call that blocks holds up all others; the limit of
    `timeout` seconds can only interrupt it where it awaits."""

    def __init__(self, functions: Functions, timeout: float):
        self._functions = functions
        self._timeout = timeout

    async def call(
        self, key: int, name: str, texts: tuple[str, ...], extra_info: dict[str, Any] | bytes
    ) -> Answer:
        """Like `Processes.call`, but extra_info is not pickled."""
        if isinstance(extra_info, bytes):  # of a sample that was begun with `Processes`
            extra_info = unpickled(extra_info)
        start = time.monotonic()
        answer = await calls.call(self._functions, name, (*texts, extra_info), self._timeout)
        elapsed = time.monotonic() - start
        if elapsed > self._timeout:
            raise Failed(f"blocked for {elapsed:.1f} s, over the limit of {self._timeout:g} s")
        return answer

    async def close(self) -> None:
        """Nothing to close."""


NO_REWARD = Path(__file__).with_name("no_reward.py")
"""The environment of runs without one."""


def load_environment(
    path: str | Path | None, timeout: float = 60.0, workers: int | None = 0
) -> Environment:
    """Load the environment file at `path`; `timeout` (seconds) bounds each call. None: every
    sample ends after a turn with the reward 0.

    workers: number of processes (`rollout.env_workers`); 0 runs it in this one, None chooses.

    Raises ConfigError naming `rollout.env_path` when the file is missing, cannot be imported, has
    no `async def step` that can be called, or one whose source shows a wrong answer.
    """
    if path is None:
        path, workers = NO_REWARD, 0
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"rollout.env_path={path}: no such file; give the path of a .py file")
    if (fault := fault_of_returns(path.read_bytes())) is not None:
        raise ConfigError(f"rollout.env_path={path}: {fault}")
    workers = default_processes() if workers is None else workers
    try:
        if workers:
            return Environment(str(path), Processes(str(path), timeout, workers))
        with undisturbed():
            functions = calls.load(str(path), path.read_bytes())
    except (Failed, Unfit) as error:
        raise ConfigError(f"rollout.env_path={path}: {error}") from error
    return Environment(str(path), InProcess(functions, timeout))
