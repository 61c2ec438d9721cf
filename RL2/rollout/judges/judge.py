"""Finds judges by name or file, and runs them on finished groups."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from RL2.algorithms.parameters import ESTIMATOR_FIELDS, FIELDS, did_you_mean, import_function
from RL2.engines.protocol import MalformedReply, SamplingParams
from RL2.environments.calls import LARGEST
from RL2.ops.token_stats import STATISTICS
from RL2.rollout.judges.agreement import agreement
from RL2.rollout.judges.asking import Asking
from RL2.rollout.judges.greedy import greedy
from RL2.rollout.judges.reward_model import RewardModel
from RL2.rollout.player import Gate, Player
from RL2.rollout.samples import Group, Sample
from RL2.runtime.errors import ConfigError, EngineError, EnvError, raised
from RL2.runtime.user_code import file_of

REWARD = "reward"
# A class is made with the node `rollout`, and its method `judge` is the judge.
JUDGES: dict[str, Callable[..., Any]] = {
    "agreement": agreement,
    "greedy": greedy,
    "reward_model": RewardModel,
}
# Names that a judge's field cannot have.
_TAKEN = {
    *FIELDS, *ESTIMATOR_FIELDS, *STATISTICS, "states", "actions", "weight_versions", "loss_weights",
    "pair_ids", "chosen", "positions", "start", "sequences", "groups", "pairs",
}  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """A judge, and the names of the fields that it adds to samples. origin: the config key and
    value that chose it. number: its place among the run's judges. start: loads what it needs, if
    anything, from the policy's tokenizer and the rank's device."""

    function: Callable[..., Coroutine[Any, Any, Mapping[str, Sequence]]]
    fields: tuple[str, ...]
    origin: str
    number: int
    start: Callable[[PreTrainedTokenizerBase, torch.device], None] | None = None

    async def __call__(self, group: Group, engine: Asking) -> None:
        """Add its fields to the samples of a group, and set its rewards.

        Raises:
            EnvError: it raises, or returns something invalid.
        """
        try:
            found = await self.function(group, engine)
        except (EnvError, MalformedReply) as error:
            raise EnvError(f"{self.origin}: {error}") from error
        except (EngineError, asyncio.CancelledError):
            raise
        except BaseException as error:  # even exit(), which would end the event loop
            what = raised(error, file_of(self.function))
            raise EnvError(f"{self.origin}: it {what}") from error
        values = self._checked(found, group.samples)
        for name, of_samples in values.items():
            for sample, value in zip(group.samples, of_samples, strict=True):
                if name == REWARD:
                    sample.set_reward(value)
                else:
                    sample.fields[name] = value

    def _checked(self, found: Any, samples: list[Sample]) -> dict[str, list]:
        if not isinstance(found, Mapping) or {*found} != {*self.fields}:
            got = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise EnvError(
                f"{self.origin}: it returned {got}; return {{name: values}} with the names of its "
                f"fields, {', '.join(self.fields)}"
            )
        return {name: self._numbers(name, found[name], samples) for name in self.fields}

    def _numbers(self, name: str, values: Any, samples: list[Sample]) -> list:
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != len(samples):
            raise EnvError(
                f"{self.origin}: {name} must be a list of {len(samples)}, one entry for each "
                f"sample of the group, and is {values!r:.80}"
            )
        whole = []
        for sample, value in zip(samples, values, strict=True):
            value = value.tolist() if hasattr(value, "tolist") else value
            one = not isinstance(value, (list, tuple))
            numbers = [value] if one else value
            n = 1 if one else sample.length
            if name == REWARD and not one or len(numbers) != n:
                expected = "one number" if name == REWARD else f"one number, or {n}, one per token"
                raise EnvError(
                    f"{self.origin}: {name} of a sample must be {expected}, and has {len(value)}"
                )
            if not all(_is_number(x) for x in numbers):
                raise EnvError(
                    f"{self.origin}: {name} of a sample is {value!r:.80}, which is not a finite "
                    "number in float32"
                )
            whole.append(float(value) if one else [float(x) for x in value])
        return whole


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) <= LARGEST


def resolve_judges(
    names: Iterable[str], rollout: Mapping[str, Any] | None = None
) -> tuple[Judge, ...]:
    """The judges that `rollout.judges` names: keys of `JUDGES`, `file.py:function` or
    `package.module:function`. rollout: that node of the config, for judges with keys of their own.

    Raises:
        ConfigError: a judge does not exist, is not an async function with two parameters, or has no
            valid fields.
    """
    judges: list[Judge] = []
    for number, name in enumerate(names):
        origin = f"rollout.judges={name}"
        if name in JUDGES:
            function = JUDGES[name]
        elif ":" in str(name):
            function = import_function(name, origin, "my_judge.py:my_judge")
        else:
            raise ConfigError(
                f"{origin}: unknown; {did_you_mean(name, JUDGES)}use {', '.join(JUDGES)}, or "
                "my_judge.py:my_judge for your own"
            )
        start = None
        if name in JUDGES and inspect.isclass(function):
            made = function(rollout)
            function, start = made.judge, made.start
        if not inspect.iscoroutinefunction(function):
            raise ConfigError(f"{origin}: is not an async function; define it with async def")
        if len(inspect.signature(function).parameters) != 2:
            raise ConfigError(f"{origin}: must take two parameters, (group, engine)")
        fields = getattr(function, "fields", ())
        fields = (fields,) if isinstance(fields, str) else tuple(fields)
        what = getattr(function, "__name__", "it")
        if not fields:
            raise ConfigError(
                f"{origin}: does not say what it adds to samples; write {what}.fields = "
                '("my_field",) below it'
            )
        for field in fields:
            if not (isinstance(field, str) and field.isidentifier()) or field in _TAKEN:
                why = "is already in use" if field in _TAKEN else "is not a valid parameter name"
                raise ConfigError(f"{origin}: its field {field} {why}; give it another name")
        if twice := [one for one in fields for other in judges if one in other.fields]:
            raise ConfigError(f"{origin}: another judge already adds {twice[0]}; keep one of them")
        judges.append(Judge(function, fields, origin, number, start))
    return tuple(judges)


def fields_of(judges: Iterable[Judge]) -> tuple[str, ...]:
    """The batch fields that judges add."""
    return tuple(name for judge in judges for name in judge.fields if name != REWARD)


async def judge_group(
    group: Group, judges: Sequence[Judge], player: Player, gate: Gate, sampling: SamplingParams
) -> None:
    """Run the judges on a finished group, one after the other. If one fails, so do the group's
    samples."""
    good = [sample for sample in group.samples if sample.error is None]
    if not good:
        group.judged = True
        return
    step, position = good[0].born
    view = Group(group.position, group.item, good)
    try:
        for judge in judges:
            seed = (player.seed, step, 1, position, -1 - judge.number)
            with Asking(player, gate, sampling, seed) as engine:
                try:
                    await judge(view, engine)
                finally:
                    good[0].judge_tokens += engine.n_tokens
    except EnvError as error:
        for sample in good:
            sample.fail(str(error), "env")
    for sample in good:
        player.shape(sample, sampling)
    group.judged = True
