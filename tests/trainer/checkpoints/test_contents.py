"""Several learners in one checkpoint, each by its name."""

import json

import pytest
import torch

from RL2.distributed import rank
from RL2.runtime.errors import CheckpointError
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from tests.ranks import run_on_ranks
from tests.trainer.support import NoData
from tests.workers.test_actor import as_spo, make_actor, make_batch, make_model, whole


def two_learners(model):
    """Of two rates and one base, so that each shows whose state it got."""
    return {
        "actor": make_actor(model, "spo"),
        "critic": make_actor(model, "spo", lr=5e-3, update_per_rollout=2),
    }


def update(learners, batch, step):
    batch = batch if rank() == 0 else None
    found = {name: learner.update(batch, step) for name, learner in learners.items()}
    return {name: (found[name], whole(learner)) for name, learner in learners.items()}


def save(model, batch, folder):
    learners = two_learners(model)
    update(learners, batch, 1)
    Checkpoints(folder).save(1, learners, {}, {})
    return {name: whole(learner) for name, learner in learners.items()}, update(learners, batch, 2)


def load(model, batch, folder):
    learners = two_learners(model)
    Checkpoints(folder).check("latest")  # before the learners are made
    # in another order than they were saved
    Checkpoints(folder).load("latest", dict(reversed(learners.items())), NoData())
    loaded = {name: whole(learner) for name, learner in learners.items()}
    done = {name: learner.scheduler.last_epoch for name, learner in learners.items()}
    try:
        Checkpoints(folder).load("latest", {"actor": learners["actor"]}, NoData())
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    return loaded, done, refused, update(learners, batch, 2)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1)])
def test_two_learners_go_on_on_any_number_of_ranks(tmp_path, before, after):
    model, batch = make_model(tmp_path / "model"), as_spo(make_batch())
    weights, expected = run_on_ranks(before, save, model, batch, tmp_path)[0]
    about = json.loads((tmp_path / "checkpoints/step000001/manifest.json").read_text())["about"]
    assert about["learners"] == ["actor", "critic"]
    for loaded, done, refused, found in run_on_ranks(after, load, model, batch, tmp_path):
        torch.testing.assert_close(loaded, weights, rtol=0, atol=0)
        assert not torch.equal(*(weights[name]["model.norm.weight"] for name in weights))
        assert done == {"actor": 1, "critic": 2}
        close = {} if before == after else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(found, expected, **close or {"rtol": 0, "atol": 0})
        assert refused == (
            "trainer.load_ckpt_from: step000001 does not load here, as it holds actor, critic, and "
            "this run trains actor; to go on from its weights only, give actor.model_name=<its "
            "final folder> and leave out trainer.load_ckpt_from"
        )
