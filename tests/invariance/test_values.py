"""A critic and a reward model however they are spread: values, gae from rewards to returns, and
updates, against the definition in float64. Tolerances are those of `test_invariance.py`."""

import numpy as np
import pytest

from tests.faults.support import LONG
from tests.invariance.cases import make_model
from tests.invariance.spreads import EPS, SPREADS, flat
from tests.invariance.test_invariance import GRADIENTS, LOGPS, MAIN, check
from tests.invariance.values import (
    CASES,
    expected_update,
    make_rollout,
    make_value_model,
    naive_gae,
    plain_value_model,
    run_values,
)
from tests.ranks import run_on_ranks

MORE = ("ddp2", "fsdp4", "tp2-sp2", "tp2-sp2-ddp2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of values, batches as a rollout gives them, those with returns, and the updates."""
    folder = tmp_path_factory.mktemp("values")
    model = make_value_model(MAIN, folder / "values")
    policy = make_model(MAIN, folder)
    rollouts = {name: make_rollout(policy, name) for name in ("mixed", "pairs")}
    plain = plain_value_model(model)
    batches = {name: naive_gae(plain, rollout) for name, rollout in rollouts.items()}
    updates = {
        name: expected_update(model, case, batches[case.batch], EPS) for name, case in CASES.items()
    }
    return model, rollouts, batches, updates


@pytest.mark.parametrize("spread", ["small", "fsdp2", "tp2", "sp2", *(MORE if LONG else ())])
def test_values_returns_and_updates(files, spread):
    model, rollouts, batches, updates = files
    sizes = {name: p.numel() for name, p in sorted(plain_value_model(model).named_parameters())}
    parameters = [*sizes], np.repeat(np.arange(len(sizes)), [*sizes.values()])
    ranks = run_on_ranks(SPREADS[spread].n_ranks, run_values, model, SPREADS[spread], rollouts)
    for name, found in ranks[0][1].items():
        mask = batches[name]["action_mask"].numpy()
        for key, values in zip(("old_values", "advantages", "returns"), found, strict=True):
            np.testing.assert_allclose(values[mask], batches[name][key][mask], **LOGPS)
    for name in CASES:
        metrics, gradients, weights = updates[name]
        expected = metrics, [flat(one) for one in gradients], flat(weights)
        for rank, _ in ranks:
            check(parameters, rank, rank.updates[name], expected, GRADIENTS)
    assert updates["three updates"][0]["critic/clip_ratio"] > 0.01
