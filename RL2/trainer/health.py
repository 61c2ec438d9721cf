"""Rules that stop an unhealthy run, which would otherwise go on and end as if it had worked.

A rule looks at the metrics of one step. Checkpoints hold how many steps in a row have broken each
rule, so a resumed run goes on counting. Updates that are not finite are counted where they happen
(`trainer.max_bad_steps`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
State = dict[str, Any]  # plain JSON values

_LENGTH_RATIO = "train/avg_response_length / its first mean"


@dataclass(frozen=True)
class Rule:
    """A condition that must not last.

    Attributes:
        metric: the metric that the message shows.
        broken: (metrics, bound) -> whether a step breaks the rule; None if the step does not tell,
            and the count stays as it is.
        problem: what is wrong.
        advice: what to look at.
        patience: (bound, trainer.health.patience) -> how many steps in a row stop the run.
    """

    metric: str
    broken: Callable[[Metrics, float], bool | None]
    problem: str
    advice: str
    patience: Callable[[Any, int], int] = lambda bound, patience: patience


def _beyond(metric: str, sign: int) -> Callable[[Metrics, float], bool | None]:
    """Whether a metric is above (`sign` 1) or below (-1) its bound."""
    return lambda metrics, bound: (
        sign * metrics[metric] > sign * bound if metric in metrics else None
    )


def _without_gradient(metrics: Metrics, bound: float) -> bool | None:
    if "actor/lr" not in metrics:  # frozen: no change is expected
        return None
    return not metrics.get("actor/grad_norm", 0.0) > 0


def _of_other_weights(metrics: Metrics, oldest: float) -> bool | None:
    age = metrics.get("rollout/staleness")
    return None if age is None else not 0 <= age <= oldest


RULES: dict[str, Rule] = {
    "no_signal_steps": Rule(
        "train/reward", _without_gradient, "no update has changed the weights",
        "look at the rewards in rollouts/, or use easier prompts or more responses per prompt",
        patience=lambda bound, patience: bound,
    ),
    "min_entropy": Rule(
        "actor/entropy", _beyond("actor/entropy", -1), "the policy has stopped exploring",
        "lower actor.lr, or use a positive actor.entropy.coef",
    ),
    "max_entropy": Rule(
        "actor/entropy", _beyond("actor/entropy", 1), "the policy writes noise",
        "lower actor.lr, or use a negative actor.entropy.coef",
    ),
    "max_p_max": Rule(
        "actor/p_max", _beyond("actor/p_max", 1), "the policy is sure of every token",
        "lower actor.lr, or use a positive actor.entropy.coef",
    ),
    "min_length_ratio": Rule(
        _LENGTH_RATIO, _beyond(_LENGTH_RATIO, -1), "responses have collapsed",
        "look at the last ones in rollouts/, and at what the environment rewards",
    ),
    "max_llm_kl": Rule(
        "rollout/llm_kl", _beyond("rollout/llm_kl", 1), "engine and trainer disagree",
        "look at rollout/staleness, rollout.dtype, actor.dtype and the engine's sampling",
    ),
    "check_versions": Rule(
        "rollout/staleness", _of_other_weights, "tokens were generated with other weights than "
        "those that the engine got for this step", "look at the engine's log",
        patience=lambda bound, patience: 1,
    ),
}  # fmt: skip
"""The rules by their keys in `trainer.health`."""


def bounds(config: DictConfig) -> dict[str, float]:
    """The bounds of the rules that this config turns on."""
    health = config.trainer.health
    found = {key: health[key] for key in RULES if health.get(key) not in (None, False)}
    if "check_versions" in found:
        rollout = config.rollout
        found["check_versions"] = float("inf") if rollout.partial_rollout else rollout.staleness
    return found


def observe(config: DictConfig, state: State, metrics: Metrics) -> tuple[State, str | None]:
    """Count one more step.

    Args:
        state: what this returned for the step before; {} at first.
        metrics: the step's metrics, on rank 0.

    Returns:
        The state after the step, and what is wrong in one line, if the run must stop.
    """
    health = config.trainer.health
    lengths = state.get("first_lengths", [])
    length = metrics.get("train/avg_response_length")
    if length is not None:
        lengths = [*lengths, length] if len(lengths) < health.patience else lengths
        metrics = metrics | {_LENGTH_RATIO: length / (fmean(lengths) or 1.0)}
    counts, problem = {}, None
    for key, bound in bounds(config).items():
        rule, before = RULES[key], state.get("in_a_row", {}).get(key, 0)
        broken = rule.broken(metrics, bound)
        counts[key] = before if broken is None else (before + 1) * broken
        if counts[key] >= rule.patience(bound, health.patience) and problem is None:
            value = metrics.get(rule.metric)
            problem = (
                f"trainer.health.{key}={str(health[key]).lower()}: {rule.problem}, "
                f"{counts[key]} steps in a row"
                + ("" if value is None else f" ({rule.metric}: {value:.4g})")
                + f"; {rule.advice}; null turns this rule off"
            )
    return {"in_a_row": counts, "first_lengths": lengths}, problem


class LLMKLAlarm:
    """Warns if engine and trainer disagree too much (`rollout.llm_kl_alarm`)."""

    def __init__(self, config: DictConfig):
        self.bound = OmegaConf.select(config, "rollout.llm_kl_alarm")
        self.on = False

    def __call__(self, metrics: Metrics) -> Metrics:
        """The alarm as a metric, for a step that has measured it."""
        bound, kl = self.bound, metrics.get("rollout/llm_kl")
        if bound is None or kl is None:
            return {}
        if kl > bound and not self.on:
            logger.warning(
                "rollout/llm_kl is %.3g, above rollout.llm_kl_alarm=%g: engine and trainer give "
                "the sampled tokens different probabilities; look at rollout/staleness, at "
                "rollout.dtype and actor.dtype, and whether rollout.train_sampling_params matches "
                "actor.temperature; actor.tis_type=mask leaves such tokens out", kl, bound,
            )  # fmt: skip
        self.on = kl > bound
        return {"rollout/llm_kl_alarm": float(self.on)}
