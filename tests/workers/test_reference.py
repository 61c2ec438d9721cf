"""A reference that follows the actor."""

import pytest
import torch
from omegaconf import OmegaConf

from RL2.distributed import rank
from RL2.runtime.errors import ConfigError
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.workers import Reference
from tests.ranks import run_on_ranks
from tests.trainer.support import NoData
from tests.workers.test_actor import actor_config, make_actor, make_batch, make_model, whole
from tests.workers.test_sharded_model import LORA

CPU = torch.device("cpu")
SPLIT = {"tp_size": 2}


def make_reference(model, **changes):
    return Reference(actor_config(model, renew_every=2, renew_mix=0.25, **changes), CPU)


def moved_actor(model, **changes):
    actor = make_actor(model, lr=0.05, **changes)
    actor.update(make_batch() if rank() == 0 else None, 1)
    actor.traffic.pop()
    return actor


def follow(model, of_actor, of_reference):
    """Weights of the reference before, after steps 1 and 2, of the actor, and bytes gathered."""
    actor, reference = moved_actor(model, **of_actor), make_reference(model, **of_reference)
    steps = [whole(reference)]
    for step in (1, 2):
        reference.follow(actor, step)
        steps.append(whole(reference))
    n_bytes = actor.traffic.pop().get("comm/weights_bytes", 0) if rank() == 0 else None
    logps = reference.annotate(make_batch() if rank() == 0 else None, {"ref_logps": "logps"})
    theirs = {name: tensor.clone() for name, tensor in actor.weights()}
    return steps, theirs, n_bytes, logps and logps["ref_logps"]


@pytest.mark.parametrize(
    "of_actor, of_reference",
    [({}, {}), ({}, SPLIT), (SPLIT, {}), (LORA, {})],
    ids=["alike", "reference split", "actor split", "adapters"],
)
def test_it_takes_its_share_of_the_actor_every_other_step(tmp_path, of_actor, of_reference):
    model = make_model(tmp_path)
    arguments = (model, OmegaConf.create(of_actor), OmegaConf.create(of_reference))
    for steps, theirs, n_bytes, _ in run_on_ranks(2, follow, *arguments):
        before, after_one, after_two = steps
        assert before.keys() == after_two.keys() == theirs.keys()
        for name, weight in before.items():
            assert torch.equal(after_one[name], weight)
            expected = 0.75 * weight + 0.25 * theirs[name]
            torch.testing.assert_close(after_two[name], expected, rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(before[name], theirs[name]) for name in before)
        assert n_bytes is None or (n_bytes == 0) == (of_actor == of_reference == {})


def save(model, folder):
    """A checkpoint with a renewed reference, one without, and what the reference says."""
    actor, reference = moved_actor(model), make_reference(model)
    checkpoints = Checkpoints(folder)
    checkpoints.references = {"ref_actor": reference}
    checkpoints.save(1, {"actor": actor}, {}, {})
    reference.follow(actor, 2)
    checkpoints.save(2, {"actor": actor}, {}, {})
    return whole(reference)


def load(model, folder):
    actor, found = make_actor(model), []
    for step in (1, 2):
        checkpoints, reference = Checkpoints(folder), make_reference(model)
        checkpoints.references = {"ref_actor": reference}
        checkpoints.load(str(checkpoints.path(step)), {"actor": actor}, NoData())
        found.append((reference.renewed, whole(reference)))
    return found


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_renewed_one_is_in_checkpoints_for_any_number_of_ranks(tmp_path, before, after):
    model = make_model(tmp_path / "model")
    (expected, *_) = run_on_ranks(before, save, model, tmp_path)
    for (first, initial), (second, renewed) in run_on_ranks(after, load, model, tmp_path):
        assert (first, second) == (False, True)
        assert all(torch.equal(renewed[name], expected[name]) for name in expected)
        assert not torch.equal(*(x["model.norm.weight"] for x in (initial, renewed)))


def check_other_shape(model, other):
    with pytest.raises(ConfigError) as error:
        make_reference(other).check(make_actor(model))
    make_reference(model).check(make_actor(model, **LORA))
    return str(error.value)


def test_the_actor_cannot_replace_another_architecture(tmp_path):
    model, other = make_model(tmp_path / "one"), make_model(tmp_path / "two", "llama")
    (text,) = run_on_ranks(1, check_other_shape, model, other)
    assert text == (
        f"ref_actor.renew_every=2: the actor cannot replace {other}, as lm_head.weight has the "
        "shape [67, 32] there and of none in the actor; use models of one shape, or 0"
    )
