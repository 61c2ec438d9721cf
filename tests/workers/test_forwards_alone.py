"""A forward to which no backward belongs: the weights are this rank's parts again, and the same."""

import pytest
import torch

from RL2.distributed import rank
from tests.ranks import run_on_ranks
from tests.workers.test_actor import as_spo, make_actor, make_batch, make_model

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "seed": 0}
AWAY = {"offload_model": True, "offload_optimizer": True, "gradient_checkpointing": True}
SPREADS = {
    "1": (1, {}), "fsdp2": (2, AWAY), "tp2": (2, {"tp_size": 2}),
    "lora-sp2": (2, {"lora": LORA, "sp_size": 2}), "naive": (2, {"token_stats": "naive"}),
}  # fmt: skip


def state(actor):
    """What engines are given, the moments, and where the schedule stands, after everything that a
    step may do with the weights."""
    actor.offload()
    actor.load(optimizer=True)
    moments = [v for one in actor.optimizer.state.values() for v in one.values()]
    moments = [getattr(value, "to_local", lambda value=value: value)() for value in moments]
    served = [tensor for _, tensor in actor.weights()]
    return [value.clone() for value in served + moments], actor.scheduler.last_epoch


def same(one, other):
    return one[1] == other[1] and all(
        torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)
    )


def idle_then_not(model, changes):
    """Which steps change nothing, before there are moments and after."""
    actor = make_actor(
        model, avg_level="correct", update_per_rollout=2, freeze_steps=1, max_bad_steps=9, **changes
    )  # fmt: skip
    good, wrong = as_spo(make_batch()), as_spo(make_batch(correct=[False] * 7))
    found = []
    before = state(actor)
    for batch, step in ((good, 1), (wrong, 2), (good, 3), (wrong, 4), (good, 1), (good, 5)):
        batch = actor.annotate(batch if rank() == 0 else None, {"old_logps": "logps"})
        actor.update(batch, step)
        after = state(actor)
        found.append(len(before[0]) == len(after[0]) and same(before, after))
        before = after
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("spread", SPREADS)
def test_steps_without_an_update_change_nothing(model, spread):
    n_ranks, changes = SPREADS[spread]
    expected = [True, True, False, True, True, False]
    assert run_on_ranks(n_ranks, idle_then_not, model, changes) == [expected] * n_ranks
