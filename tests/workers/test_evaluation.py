"""An evaluation measures what the update at the same weights does, and changes nothing."""

from dataclasses import replace

import pytest
import torch

from RL2.algorithms import resolve_loss
from RL2.distributed import rank
from RL2.runtime.errors import TrainingError
from RL2.workers import Actor
from RL2.workers.evaluation import evaluate
from tests.ranks import run_on_ranks
from tests.workers.test_actor import actor_config, make_actor, make_batch, make_model, whole


def evaluate_and_update(model, loss, changes, batch):
    """Metrics of an evaluation and of the update after it, and whether weights, gradients and
    random states were left as they were."""
    actor = make_actor(model, loss, **changes)
    batch = batch if rank() == 0 else None
    before, random = whole(actor), torch.get_rng_state()
    tested = evaluate(actor, batch)
    kept = all(torch.equal(before[name], now) for name, now in whole(actor).items())
    kept &= torch.equal(random, torch.get_rng_state())
    kept &= all(parameter.grad is None for parameter in actor.model.parameters())
    return tested, actor.update(batch, 1), kept


def pairs_of(batch):
    n = len(batch["states"]) // 2
    chosen = torch.tensor([True, False]).repeat(n)
    return {name: value[: 2 * n] for name, value in batch.items()} | {
        "pair_ids": torch.arange(n).repeat_interleave(2),
        "chosen": chosen,
        "ref_logps": batch["old_logps"][: 2 * n],
    }


@pytest.mark.parametrize(
    ("loss", "level"), [("spo", "token"), ("spo", "sequence"), ("gspo", "token"), ("dpo", "token")]
)
def test_it_is_what_the_update_measures(tmp_path, loss, level):
    """On any number of ranks, and however the rows are packed."""
    model, batch = make_model(tmp_path), make_batch(8)
    batch = pairs_of(batch) if loss == "dpo" else batch
    changes = {"avg_level": level}
    ((tested, updated, kept),) = run_on_ranks(1, evaluate_and_update, model, loss, changes, batch)
    assert kept
    of_update = {
        name.replace("actor/", "test/"): value
        for name, value in updated.items()
        if name.startswith("actor/")
    }
    for name in ("grad_norm", "skipped", "nonfinite", "lr"):
        del of_update[f"test/{name}"]
    assert tested == pytest.approx(of_update, rel=1e-5, abs=1e-7)
    packed = changes | {"max_length_per_device": 48}
    for other, _, kept in run_on_ranks(2, evaluate_and_update, model, loss, packed, batch):
        assert kept
        assert other == pytest.approx(tested, rel=1e-5, abs=1e-7)


def drawing(logps, advantages):
    ones = torch.ones_like(logps)
    return -logps * torch.rand_like(logps), {"one": ones, "infinite": ones / 0}


def raising(logps, advantages):
    return (-logps)[:1]


def evaluate_with(model, name, batch):
    loss = resolve_loss({"import_path": f"{__name__}:drawing"})
    loss = replace(loss, function=raising) if name == "raising" else loss
    actor = Actor(actor_config(model), torch.device("cpu"), loss, 2)
    random = torch.get_rng_state()
    try:
        tested = evaluate(actor, batch if rank() == 0 else None)
    except TrainingError as error:
        return str(error)
    return tested, torch.equal(random, torch.get_rng_state()), evaluate(actor, None)


def test_losses_of_the_user(tmp_path):
    """One that draws random numbers leaves the generator as it was; a metric that is not finite is
    there, so that it is reported; one that breaks its contract ends the run on every rank; without
    a batch there is nothing."""
    model, batch = make_model(tmp_path), make_batch()
    for tested, kept, of_nothing in run_on_ranks(2, evaluate_with, model, "drawing", batch):
        assert kept and tested["test/one"] == pytest.approx(1) and of_nothing == {}
        assert tested["test/infinite"] == float("inf")
    for said in run_on_ranks(2, evaluate_with, model, "raising", batch):
        assert "expected a tensor" in said
