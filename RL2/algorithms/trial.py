"""Tries a loss on made-up tokens, so that one that cannot train is found before a model loads."""

from __future__ import annotations

import gc
import inspect
import logging
import math
import random
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from RL2.algorithms.parameters import OLD_STATISTICS
from RL2.algorithms.segments import KINDS, SEGMENTS, kept_together, kinds_of, segments_of
from RL2.ops.token_stats import CONSTANT
from RL2.runtime.errors import ConfigError
from RL2.runtime.user_code import Unfit, file_of

logger = logging.getLogger(__name__)

Values = dict[str, Any]
Loss = Callable[[Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]

# For a trial with sequences: the row of each token, and what the rows belong to. Seven tokens make
# four sequences, three groups and two pairs, so that the shape of the losses tells their kind.
_ROW = torch.tensor([0, 0, 0, 1, 1, 2, 3])
_ROWS = {
    "sample_ids": torch.tensor([0, 1, 2, 3]),
    "group_ids": torch.tensor([0, 0, 1, 2]),
    "pair_ids": torch.tensor([0, 0, 1, 1]),
    "chosen": torch.tensor([1, 0, 1, 0]),
}


def tokens(top_k: int, inputs: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Three tokens as a rollout has them, before an update that is not the first: every statistic
    and field by name, and those of `inputs` that a judge or source brings."""
    p, p_max = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.7, 0.5, 0.6])
    # Three tokens each, then repeatedly half of what is left.
    top = torch.tensor([[0.7, 0.15, 0.1], [0.5, 0.2, 0.15], [0.6, 0.2, 0.1]])
    halves = 0.5 ** torch.arange(1, max(1, top_k - 1))  # empty up to three
    top = torch.cat([top, (1 - top.sum(-1, keepdim=True)) * halves], -1)[:, :top_k]
    values = {
        "logps": p.log(),
        "log1mps": (-p).log1p(),
        "max_logps": p_max.log(),
        "max_log1mps": (-p_max).log1p(),
        "entropy": torch.tensor([0.8, 1.0, 1.2]),
        "ranks": torch.tensor([1.0, 2.0, 3.0]),
        "top_logps": top.log(),
        "values": torch.tensor([0.5, -0.2, 0.8]),
        "old_values": torch.tensor([0.4, -0.1, 1.0]),
        "returns": torch.tensor([0.9, 0.9, 1.0]),
        "top_ids": torch.arange(max(1, top_k)).int().expand(3, -1),
        "at_logps": torch.tensor([[0.6, 0.2, 0.1], [0.2, 0.3, 0.1], [0.1, 0.6, 0.2]]).log(),
        "teacher_logps": p.log() + 0.2,
        "teacher_top_logps": torch.tensor([[0.7, 0.2, 0], [0.5, 0.3, 0.1], [0.4, 0.3, 0.2]]).log(),
        "teacher_top_ids": torch.tensor([[5, 1, 3], [0, 2, 4], [3, 5, 1]]).int(),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "old_logps": p.log() + 0.1,
        "ref_logps": p.log() - 0.1,
        "llm_logps": p.log() + 0.05,
        "rewards": torch.tensor([0.0, 0.0, 1.0]),
        "turn_ids": torch.tensor([0, 0, 1]),
    }
    values |= {name: 0.9 * values[now] for name, now in OLD_STATISTICS.items()}
    return values | {name: torch.tensor([0.5, 0.2, 0.7]) for name in inputs if name not in values}


def _ordinary(inputs: tuple[str, ...], top_k: int) -> Values:
    """The same for a loss that takes `inputs`: seven tokens and their sequences, if it takes
    sequences."""
    values = tokens(top_k, tuple(name for name in inputs if name not in SEGMENTS))
    if not {*inputs} & SEGMENTS.keys():
        return values
    values = {name: value[_cycle(len(_ROW))] for name, value in values.items()}
    return values | segments_of(_ROW, _ROWS, SEGMENTS, "cpu")


def _cycle(n: int) -> Tensor:
    return torch.arange(n) % 3


def _of_one_policy(values: Values) -> Values:
    """The first update after a rollout: all policies are the trained one."""
    of_tokens = ("old_logps", "ref_logps", "llm_logps", "teacher_logps")
    values = values | {name: values["logps"] for name in of_tokens}
    values |= {"old_values": values["values"], "teacher_top_logps": values["at_logps"]}
    return values | {name: values[now] for name, now in OLD_STATISTICS.items()}


def _without_reward(values: Values) -> Values:
    return values | {name: torch.zeros_like(values[name]) for name in ("advantages", "rewards")}


def _peaked(values: Values) -> Values:
    """One token of the vocabulary has all but `rest` of the probability. It was sampled, except in
    the second row, where a token of probability 1e-12 was."""
    rest = torch.tensor([1e-6, 1e-6, 0.0])
    sampled = torch.tensor([True, False, True])
    most, log_rest = (-rest).log1p(), rest.log()
    top = (rest / 1e5).log()[:, None].expand_as(values["top_logps"][:3]).clone()
    top[:, :1] = most[:, None]
    changed = {
        "logps": most.where(sampled, torch.tensor(1e-12).log()),
        "log1mps": log_rest.where(sampled, torch.tensor(-1e-12)),
        "max_logps": most,
        "max_log1mps": log_rest,
        "entropy": 20 * rest,
        "ranks": torch.tensor([1.0, 1000.0, 1.0]),
        "top_logps": top,
        # All that the student gives, or almost nothing: it prefers others than the teacher.
        "at_logps": torch.stack([most, *2 * [log_rest.clamp(min=-120) - math.log(2)]], -1).where(
            sampled[:, None], torch.tensor([-90.0, -200.0, -14.0])
        ),
    }
    rows = _cycle(len(values["logps"]))
    return _of_one_policy(values | {name: value[rows] for name, value in changed.items()})


# Kinds of tokens that every run meets.
_ALWAYS: tuple[tuple[str, Callable[[Values], Values]], ...] = (
    ("ordinary tokens", lambda values: values),
    ("ordinary tokens of a policy that was not updated since", _of_one_policy),
)
# What many runs meet, but not all.
_OFTEN = (
    ("tokens without reward or advantage", _without_reward),
    ("tokens with probabilities of 0.999999, 1e-12 and exactly 1", _peaked),
)


def try_out(
    loss: Loss,
    function: Callable[..., Any],
    inputs: tuple[str, ...],
    statistics: tuple[str, ...],
    top_k: int,
    origin: str,
) -> bool:
    """Call a loss on three tokens of each kind that it can tell apart; on seven tokens of four
    sequences if it takes sequences.

    Args:
        function: the function whose file and lines errors name.
        inputs: the names of what the loss takes.
        statistics: those of them that the model computes.
        origin: the key and value that chose the loss.

    Returns:
        Whether it draws random numbers. The run's generators are left unchanged.

    Raises:
        ConfigError: it raises, breaks `RL2.algorithms.contract`, has no gradient, seeds the run's
            random numbers, or a loss or gradient is not finite on tokens that every run meets. For
            other tokens, and for a loss that differs if a token is alone, it warns.
    """
    ordinary = _ordinary(inputs, top_k)
    with torch.random.fork_rng(devices=[]):
        with Collectives() as seen:
            _try_kinds(loss, function, inputs, statistics, ordinary, origin)
        if seen.name is not None:
            raise ConfigError(
                f"{origin}: it calls a collective ({seen.name}), but ranks call a loss neither "
                "equally often nor in the same order; return values per token instead"
            )
        try:
            draws = draws_random(loss, ordinary, statistics, origin)
            if not draws:
                _try_alone(loss, ordinary, inputs, statistics, origin)
            _try_memory(loss, ordinary, statistics, origin)
        except Unfit as fault:  # only when called again
            raise _error(origin, ordinary, "ordinary tokens", fault) from fault.__cause__
    return draws


def kind_of(
    loss: Loss, inputs: tuple[str, ...], statistics: tuple[str, ...], top_k: int, origin: str
) -> str:
    """What a loss that takes sequences returns one value for: a key of `KINDS`.

    Raises:
        ConfigError: it raises, or returns anything else.
    """
    values = _ordinary(inputs, top_k)
    try:
        with torch.random.fork_rng(devices=[]):
            losses, _ = loss(_given(values, statistics))
    except Unfit as fault:
        raise _error(origin, values, "ordinary tokens", fault) from fault.__cause__
    sizes = kinds_of(len(values["logps"]), values)
    return next(kind for kind, n in sizes.items() if n == len(losses))


def _error(origin: str, values: Values, what: str, fault: Unfit) -> ConfigError:
    n = "three" if len(values["logps"]) == 3 else "seven"
    return ConfigError(f"{origin}: on {n} {what}, {fault}")


def _given(values: Values, statistics: tuple[str, ...]) -> Values:
    """A copy of `values` as in an update: what the model computes requires a gradient."""
    copies = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    for name in statistics:
        copies[name].requires_grad_(name not in CONSTANT)
    return copies


def _try_kinds(
    loss: Loss,
    function: Callable[..., Any],
    inputs: tuple[str, ...],
    statistics: tuple[str, ...],
    ordinary: Values,
    origin: str,
) -> None:
    for kinds in (_ALWAYS, _OFTEN):
        for what, change in kinds:
            values = change(ordinary)
            if values is not ordinary and all(values[name] is ordinary[name] for name in inputs):
                continue
            try:
                _check(loss, function, values, statistics, kinds is _ALWAYS)
            except Unfit as fault:
                if kinds is _ALWAYS:
                    raise _error(origin, values, what, fault) from fault.__cause__
                logger.warning(
                    "%s: on %s, %s; an update with one is left out (actor/nonfinite), or "
                    "stops the run",
                    origin, what, fault,
                )  # fmt: skip


def draws_random(
    loss: Loss,
    values: Values,
    statistics: tuple[str, ...],
    origin: str,
    effect: str = "results depend on actor.max_length_per_device and on the number of ranks",
) -> bool:
    """Whether a call draws random numbers, with a warning; ConfigError if it seeds torch's
    generator. effect: what drawing from torch's generator leads to."""
    before, after = [], []
    for seed in (0, 1):
        torch.default_generator.manual_seed(seed)
        before.append(torch.get_rng_state())
        loss(_given(values, statistics))
        after.append(torch.get_rng_state())
    if torch.equal(*after):
        raise ConfigError(
            f"{origin}: it seeds torch's random numbers, which the whole run draws from; leave "
            "torch.manual_seed out, or give a torch.Generator of its own"
        )
    others = random.getstate(), np.random.get_state()[1:3]
    loss(_given(values, statistics))
    now = random.getstate(), np.random.get_state()[1:3]
    if others[0] != now[0] or others[1][1] != now[1][1] or (others[1][0] != now[1][0]).any():
        logger.warning(
            "%s: draws random numbers of Python or numpy, which have no seed here and are in no "
            "checkpoint, so that runs cannot be repeated; use torch's", origin,
        )  # fmt: skip
        return True
    if draws := not torch.equal(before[0], after[0]):
        logger.warning("%s: draws random numbers, so that %s", origin, effect)
    return draws


def _try_alone(
    loss: Loss,
    values: Values,
    inputs: tuple[str, ...],
    statistics: tuple[str, ...],
    origin: str,
) -> None:
    """Warn if the loss of a token, sequence, group or pair depends on the others."""
    together, _ = loss(_given(values, statistics))
    what, parts = _parts(values, inputs)
    try:
        alone = [loss(_given(part, statistics))[0] for part in parts]
    except Unfit as fault:
        logger.warning("%s: on one %s alone, %s", origin, what, fault)
        return
    if not torch.allclose(together, torch.cat(alone), 1e-4, 1e-5, equal_nan=True):
        logger.warning(
            "%s: the loss of a %s depends on the others that it is called with, which are some "
            "of a batch; results depend on actor.max_length_per_device and the number of ranks",
            origin, what,
        )  # fmt: skip


def _parts(values: Values, inputs: tuple[str, ...]) -> tuple[str, list[Values]]:
    """The smallest parts that a loss may be called with, and what each of them is."""
    named = [name for name in SEGMENTS if name in inputs]
    fields = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not named:
        n = len(fields["logps"])
        return "token", [{name: x[[i]] for name, x in fields.items()} for i in range(n)]
    unit, parts = kept_together(_ROWS, named), []
    for one in unit.unique():
        token, row = unit[_ROW] == one, unit == one
        rows = {name: x[row] for name, x in _ROWS.items()}
        own = segments_of(_ROW[token] - int(row.nonzero()[0]), rows, SEGMENTS, "cpu")
        parts.append({name: x[token] for name, x in fields.items()} | own)
    return KINDS[named[-1]], parts


def _try_memory(loss: Loss, values: Values, statistics: tuple[str, ...], origin: str) -> None:
    """Warn of a loss that keeps its inputs after each call."""
    first: list[weakref.ref[Tensor]] = []
    for _ in range(4):  # keeping only the last one is no leak
        given = _given(values, statistics)
        first = first or [weakref.ref(given[name]) for name in statistics]
        loss(given)
        del given
    if any(one() is not None for one in first):
        gc.collect()
    if any(one() is not None for one in first):
        logger.warning(
            "%s: keeps tensors of each call, so that memory grows with every step; keep numbers, "
            "or results of .detach().clone(), and not for all calls", origin,
        )  # fmt: skip


def _check(
    loss: Loss,
    function: Callable[..., Any],
    values: Values,
    statistics: tuple[str, ...],
    learns: bool,
) -> None:
    """Raises Unfit, which names the line that causes it. learns: whether a gradient is needed."""
    values = _given(values, statistics)
    learned = {name: values[name] for name in statistics if name not in CONSTANT}
    with torch.enable_grad():
        losses, _ = loss(values)
    if learns and not losses.requires_grad:
        raise Unfit(
            "its losses have no gradient; compute them from "
            f"{', '.join(statistics)} without detaching"
        )
    if not losses.isfinite().all():
        raise Unfit(f"its losses are {_numbers(losses)}{where_it_begins(loss, function, values)}")
    if not losses.requires_grad:
        return
    gradients = torch.autograd.grad(losses.sum(), [*learned.values()], allow_unused=True)
    for name, gradient in zip(learned, gradients, strict=True):
        if gradient is not None and not gradient.isfinite().all():
            numbers = _numbers(gradient[:, 0] if gradient.dim() > 1 else gradient)
            raise Unfit(
                f"its gradient for {name} is {numbers}{where_it_begins(loss, function, values)}"
            )


def where_it_begins(loss: Loss, function: Callable[..., Any], values: Values) -> str:
    """The line with the first number that is not finite, or else that of the loss itself."""
    file = file_of(function)
    if file is None:
        return ""
    with _Watch(file) as watch:
        loss(values)
    line = inspect.unwrap(function).__code__.co_firstlineno
    return f" ({watch.place or f'{Path(file).name}:{line}'})"


class Collectives(TorchDispatchMode):
    """Notes the name of a collective."""

    name: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.name = func.__name__.split(".")[0].rstrip("_")
        return func(*args, **(kwargs or {}))


class _Watch(TorchFunctionMode):
    """Notes the line of a file at which the first nan or infinity appears, and its operation."""

    def __init__(self, file: str):
        super().__init__()
        self.file, self.place = file, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.place is None and _makes_bad(result, [*args, *(kwargs or {}).values()]):
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename != self.file:
                frame = frame.f_back
            if frame is not None:
                name = getattr(func, "__name__", "").strip("_")
                self.place = f"{Path(self.file).name}:{frame.f_lineno}, {name}"
        return result


def _makes_bad(result: Any, args: list[Any]) -> bool:
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return False
    given = [one for one in args if isinstance(one, Tensor) and one.is_floating_point()]
    if result.isnan().any():
        return not any(one.isnan().any() for one in given)
    return not result.isfinite().all() and all(one.isfinite().all() for one in given)


def _numbers(values: Tensor) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values.tolist())}]"
