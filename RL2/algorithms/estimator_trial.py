"""Tries an advantage estimator on made-up batches, so that one that cannot work is found before a
model loads."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from RL2.algorithms.parameters import ESTIMATOR_FIELDS, OLD_STATISTICS
from RL2.algorithms.trial import Collectives, draws_random, logger, where_it_begins
from RL2.runtime.errors import ConfigError
from RL2.runtime.user_code import Unfit

_LENGTHS = (4, 3, 2, 4, 3)
_N_TOKENS = max(_LENGTHS)
Batch = dict[str, Tensor]


def rollout(others: tuple[str, ...] = ()) -> Batch:
    """Two prompts with two samples each, the first of them in two rows; the prompt is one token
    and the last row has three turns. Fields have the names that an estimator uses; `others` are
    fields of a judge or source."""
    position = torch.arange(_N_TOKENS)
    lengths = torch.tensor(_LENGTHS)
    mask = (position < lengths[:, None]) & (position > 0)
    last = position == lengths[:, None] - 1
    p = 0.1 + 0.8 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    p_max = torch.maximum(p, 1 - p)
    rewards = last * torch.tensor([0.0, 1.0, 0.0, 0.5, 2.0], dtype=torch.float64)[:, None]
    turn_ids = torch.zeros_like(mask, dtype=torch.int64)
    turn_ids[1], turn_ids[4] = 1, position - 1
    values = {
        "rewards": rewards,
        "action_mask": mask,
        "sample_ids": torch.tensor([0, 0, 1, 2, 3]),
        "group_ids": torch.tensor([0, 0, 0, 1, 1]),
        "lengths": lengths,
        "correct": torch.tensor([True, True, False, True, True]),
        "reward_parts": torch.tensor(
            [[0.0, 1.0], [0.0, 1.0], [1.0, 0.5], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64
        ),
        "reward_weights": torch.tensor([1.0, 0.5], dtype=torch.float64).expand(5, 2).clone(),
        "turn_ids": turn_ids.masked_fill(~mask, -1),
        "old_logps": p.log(),
        "ref_logps": p.log() - 0.1,
        "llm_logps": p.log() + 0.05,
        "values": p - 0.3,
        "teacher_logps": p.log() + 0.2,
        "log1mps": (-p).log1p(),
        "max_logps": p_max.log(),
        "max_log1mps": (-p_max).log1p(),
        "entropy": -p * p.log() - (1 - p) * (-p).log1p(),
        "ranks": (p < 0.5) + 1.0,
    } | {name: p for name in others if name not in ESTIMATOR_FIELDS}
    return {
        name: x * mask if x.shape == mask.shape and x.is_floating_point() else x
        for name, x in values.items()
    }


def _rows(values: Batch, rows: Tensor) -> Batch:
    return {name: x[rows] for name, x in values.items()}


def _of_one_sample(values: Batch) -> Batch:
    return _rows(values, torch.tensor([3]))


def _of_equal_rewards(values: Batch) -> Batch:
    last = values["rewards"] != 0
    last[0], last[2, 1] = False, True  # one reward for each sample
    rewards = last.to(values["rewards"])
    return values | {"rewards": rewards, "correct": torch.ones_like(values["correct"])}


def _without_reward(values: Batch) -> Batch:
    zeros = torch.zeros_like(values["rewards"])
    return values | {"rewards": zeros, "correct": torch.zeros_like(values["correct"])}


_ALWAYS: tuple[tuple[str, Callable[[Batch], Batch]], ...] = (
    ("two prompts with two samples each", lambda values: values),
)
# What many runs meet, but not all.
_OFTEN = (
    ("a batch of one sample", _of_one_sample),
    ("a batch of equal rewards", _of_equal_rewards),
    ("a batch without rewards", _without_reward),
)


def _named(values: Batch) -> Batch:
    """Copies of these values under their names in a batch."""
    fields = {now: field for field, now in OLD_STATISTICS.items()} | {"values": "old_values"}
    return {fields.get(name, name): x.clone() for name, x in values.items()}


def try_out(estimator: Any, function: Callable[..., Any], origin: str) -> set[str]:
    """Call an estimator (`RL2.algorithms.estimator.Estimator`) with made-up batches; returns the
    names of what it gives.

    function: the function whose file and lines errors name.
    origin: the key and value that chose the estimator.

    Raises:
        ConfigError: it raises, breaks its contract, calls a collective, seeds the run's random
            numbers, or an advantage is not finite in a batch that every run meets. For other
            batches, and for random numbers, it warns.
    """

    def call(values: Mapping[str, Tensor]) -> Batch:
        return estimator(_named({**values}))

    def call_alone(values: Mapping[str, Tensor]) -> Any:
        return estimator.function(*[values[name].clone() for name in estimator.inputs])

    ordinary, given = rollout(estimator.inputs), set()
    with torch.random.fork_rng(devices=[]):
        with Collectives() as seen:
            for kinds in (_ALWAYS, _OFTEN):
                for what, change in kinds:
                    values = change(ordinary)
                    try:
                        given |= call(values).keys()
                    except Unfit as fault:
                        text = f"{origin}: on {what}, {fault}"
                        if "not finite" in str(fault):
                            text += where_it_begins(call_alone, function, values)
                        if kinds is _ALWAYS:
                            raise ConfigError(text) from fault.__cause__
                        logger.warning("%s; such a rollout ends the run", text)
        if seen.name is not None:
            raise ConfigError(
                f"{origin}: it calls a collective ({seen.name}), but only rank 0 calls an "
                "estimator; its batch is whole, so compute advantages from that"
            )
        try:
            effect = "a run with dropout or another number of ranks draws other numbers"
            draws_random(call, ordinary, (), origin, effect)
        except Unfit as fault:  # only when called again
            raise ConfigError(f"{origin}: called again, {fault}") from fault.__cause__
    return given
