"""The same update however it is spread.

Every case of `cases.py` (loss x `avg_level` x advantage, and what else may go into an update) is
run under every spread of `spreads.py` and compared with two references: the actor of one process
that runs each row alone, and the definition in float64 by autograd (`reference.py`).

Tolerances, all in fp32:

    what                          relative    beside that
    metrics, gradient norm        1e-5        1e-7: means in which terms of both signs cancel
    gradient of a parameter       1e-5 of     1e-7 of the norm of the whole gradient: q and
                                  its norm    k have none where rows have one token
      ... of the other models     3e-5        two layers of large weights: one process alone is up
                                              to 7e-6 away from float64, and tensor parallelism adds
                                              up in another order
    weights after the steps       1e-6        lr * a relative error of the gradient
    log-probabilities             1e-5        1e-6
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from RL2.algorithms import resolve_loss
from tests.invariance import reference
from tests.invariance.cases import (
    CASES,
    FAMILY_CASES,
    SOME_CASES,
    TEMPERATURE,
    make_batch,
    make_model,
)
from tests.invariance.spreads import (
    EPS,
    SPREADS,
    TOP_K,
    RankResult,
    Update,
    flat,
    run_spread,
    run_two_policies,
    spread_config,
)
from tests.ranks import run_on_ranks

METRICS = {"rel": 1e-5, "abs": 1e-7}
GRADIENTS, OTHER_MODELS, OF_THE_WHOLE = 1e-5, 3e-5, 1e-7
# log(1 - p) of tokens with p near 1 multiplies the rounding of sums over shards: 1e-6 of a q_proj
# gradient of norm 0.0245 with fixed_target_kl.
OF_MODELS = {"few_words": 5e-5}
WEIGHTS = 1e-6
LOGPS = {"rtol": 1e-5, "atol": 1e-6}

# All cases with the first model; some with each of the others, and with spreads that combine what
# has been tried by itself.
MAIN = "qwen3"
ALL_CASES = (
    "alone", "packed", "small", "fsdp2", "ddp2", "tp2", "sp2", "fsdp4",
)  # fmt: skip
SPREADS_OF = {
    MAIN: (
        *ALL_CASES[1:],
        "checkpointing",
        "ddp2-fsdp2",
        "tp2-sp2",
        "ddp4",
        "tp2-fsdp2",
        "tp2-ddp2",
        "sp2-fsdp4",
        "sp2-ddp2",
        "sp4",
        "tp2-sp2-ddp2",
    ),
    "qwen3_untied": ("packed", "tp2-fsdp2", "sp4"),
    "qwen2": ("ddp2-fsdp2", "tp2-fsdp2", "tp2-sp2"),
    "llama": ("tp4", "tp2-ddp2", "sp2-fsdp4"),
    "mistral": ("packed", "tp2-sp2", "sp4"),
    "few_words": ("tp4", "tp2-fsdp2"),
    "odd": ("fsdp4", "tp2-fsdp2", "tp2-sp2"),
    "three_key_heads": ("fsdp3", "tp3", "sp3", "sp2-ddp2"),
    "gpt2": ("ddp2-fsdp2", "sp4"),
}
BATCHES = ("mixed", "one_row", "rows_of_one_token", "rows_without_actions")


def cases_of(model: str, spread: str) -> dict:
    if model != MAIN:
        return FAMILY_CASES
    return CASES if spread in ALL_CASES else SOME_CASES


def spreads() -> list[tuple[str, str]]:
    return [(model, spread) for model, names in SPREADS_OF.items() for spread in names]


def items() -> list:
    return [
        pytest.param(model, spread, case, id=f"{model}-{spread}-{case}")
        for model, spread in spreads()
        for case in cases_of(model, spread)
    ]


# Metrics, and as flat arrays the gradient of each optimizer step and the weights.
Expected = tuple[dict[str, float], list[np.ndarray], np.ndarray]


class Runs:
    """All results, each computed when it is first asked for: a spread's cases in one go.

    Args:
        selected: the cases that any test of this session looks at.
    """

    def __init__(self, folder: Path, selected: set[str]):
        self.selected = selected
        self.path = cache(lambda model: make_model(model, folder))
        self.plain = cache(lambda model: reference.plain_model(self.path(model)))
        self.task = cache(lambda model, case: CASES[case].task(self.path(model)))
        self.exact = cache(self._exact)
        self.spread = cache(self._spread)
        self.parameters = cache(self._parameters)

    def alone(self, model: str, case: str) -> Expected:
        """As `exact`, by the actor of one process."""
        (rank,) = self.spread(model, "alone")
        update = rank.updates[case]
        assert (rank.where == np.arange(len(rank.where))).all()
        return update.metrics, update.gradients, update.weights

    def batches(self, model: str) -> dict:
        return {name: make_batch(self.path(model), name) for name in BATCHES}

    def _exact(self, model: str, case: str) -> Expected:
        task = self.task(model, case)
        config = spread_config(self.path(model), SPREADS["alone"], **task.changes)
        metrics, gradients, weights = reference.update(
            self.plain(model), config, resolve_loss(task.loss), task.batch, EPS
        )
        return metrics, [flat(gradient) for gradient in gradients], flat(weights)

    def _parameters(self, model: str) -> tuple[list[str], np.ndarray]:
        """Their names, and which one each element of the flat array belongs to."""
        sizes = {name: p.numel() for name, p in sorted(self.plain(model).named_parameters())}
        return [*sizes], np.repeat(np.arange(len(sizes)), [*sizes.values()])

    def _spread(self, model: str, spread: str) -> list[RankResult]:
        cases = [case for case in cases_of(model, spread) if case in self.selected]
        tasks = {case: self.task(model, case) for case in cases}
        arguments = self.path(model), SPREADS[spread], tasks, self.batches(model)
        ranks = run_on_ranks(SPREADS[spread].n_ranks, run_spread, *arguments)
        held = np.unique(np.concatenate([rank.where for rank in ranks]))
        assert (held == np.arange(len(self.parameters(model)[1]))).all()
        return ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Runs:
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {one.params["case"] for one in parameters if one and "case" in one.params}
    return Runs(tmp_path_factory.mktemp("invariance"), selected)


def check(
    parameters, rank: RankResult, update: Update, expected: Expected, tolerance: float
) -> None:
    (names, owner), (metrics, gradients, weights) = parameters, expected

    def far(own: np.ndarray, whole: np.ndarray, relative: float, of_the_whole: float) -> list[str]:
        norms = np.sqrt(np.bincount(owner, whole**2))
        difference = (own.astype(np.float64) - whole[rank.where]) ** 2
        distances = np.sqrt(np.bincount(owner[rank.where], difference, len(names)))
        bounds = relative * norms + of_the_whole * np.linalg.norm(whole)
        return [
            f"{name}: {distance:.3g} away, norm {norm:.3g}"
            for name, distance, norm, bound in zip(names, distances, norms, bounds, strict=True)
            if not distance <= bound
        ]

    assert update.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert update.metrics[name] == pytest.approx(value, **METRICS), name
    assert len(update.gradients) == len(gradients)
    for own, whole in zip(update.gradients, gradients, strict=True):
        assert not far(own, whole, tolerance, OF_THE_WHOLE)
    assert not far(update.weights, weights, WEIGHTS, 0.0)


@pytest.mark.parametrize(("model", "spread", "case"), items())
def test_update(runs, model, spread, case):
    parameters = runs.parameters(model)
    tolerance = GRADIENTS if model == MAIN else OF_MODELS.get(model, OTHER_MODELS)
    for rank in runs.spread(model, spread):
        check(parameters, rank, rank.updates[case], runs.exact(model, case), tolerance)
        if model == MAIN:
            check(parameters, rank, rank.updates[case], runs.alone(model, case), tolerance)


@pytest.mark.parametrize("case", CASES)
def test_one_process_and_rows_alone_are_the_definition(runs, case):
    (alone,) = runs.spread(MAIN, "alone")
    check(runs.parameters(MAIN), alone, alone.updates[case], runs.exact(MAIN, case), GRADIENTS)


def check_logps(plain, batches: dict, logps: dict[str, np.ndarray]) -> None:
    for name, batch in batches.items():
        expected = reference.logps(plain, batch, TEMPERATURE).float().numpy()
        np.testing.assert_allclose(logps[name], expected, **LOGPS)
        assert (logps[name][~batch["action_mask"].numpy()] == 0).all()


@pytest.mark.parametrize(("model", "spread"), spreads())
def test_logps(runs, model, spread):
    first, *others = runs.spread(model, spread)
    for logps in first.logps:
        check_logps(runs.plain(model), runs.batches(model), logps)
    assert all(x is None for rank in others for logps in rank.logps for x in logps.values())
    for name, batch in runs.batches(model).items():
        check_tops(runs.plain(model), batch, *first.tops[name])


def check_tops(plain, batch: dict, logps, top_logps, top_ids) -> None:
    """Of a teacher: those of the actions, and in descending order those of the likeliest tokens."""
    mask = batch["action_mask"].numpy()
    own, top, of_ids = reference.tops(plain, batch, TEMPERATURE, TOP_K, top_ids)
    np.testing.assert_allclose(logps[mask], own, **LOGPS)
    np.testing.assert_allclose(top_logps[mask], top, **LOGPS)
    np.testing.assert_allclose(top_logps[mask], of_ids, **LOGPS)


def test_policies_whose_ranks_share_the_work_in_different_ways(runs):
    batches = runs.batches(MAIN)
    first, *others = run_on_ranks(4, run_two_policies, runs.path(MAIN), batches)
    assert len(first) == 4
    for logps in first:
        check_logps(runs.plain(MAIN), batches, logps)
    assert all(x is None for rank in others for logps in rank for x in logps.values())
