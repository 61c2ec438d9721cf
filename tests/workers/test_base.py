"""What every worker has in common."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from RL2.distributed import rank
from RL2.workers import Actor
from tests.ranks import run_on_ranks
from tests.workers.test_actor import actor_config, make_actor, make_batch, make_model

LORA = {
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "seed": 0}
}  # fmt: skip
SPREADS = [
    (1, {}), (2, {}), (2, {"ddp_size": 2}), (2, {"tp_size": 2}), (2, {"sp_size": 2}), (1, LORA),
    (2, LORA), (2, LORA | {"tp_size": 2}), (1, {"offload_model": True}),
]  # fmt: skip


def read_after_a_forward(model, changes, trained, batch):
    """What those find who use a model after log-probabilities, and no update, were computed."""
    if trained:
        actor = make_actor(model, "ppo", **changes)
    else:
        actor = Actor(actor_config(model, **changes), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in actor.weights()}
    n_bytes = actor.traffic.pop()["comm/weights_bytes"]
    answer = actor.compute_logps(batch if rank() == 0 else None, "old_logps")
    split = all(isinstance(parameter, DTensor) for parameter in actor.model.parameters())
    actor.traffic.pop()
    after = {name: tensor.clone() for name, tensor in actor.weights()}
    same = before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    same &= actor.traffic.pop()["comm/weights_bytes"] == n_bytes
    if trained:
        # Twice: the first saves what a frozen step leaves, the second what follows an update.
        get_state_dict(actor.model, actor.optimizer)
        actor.update(answer, 1)
        get_state_dict(actor.model, actor.optimizer)
        actor.compute_logps(batch if rank() == 0 else None, "old_logps")
        dict(actor.weights())
    return split, same


CASES = [(*spread, True) for spread in SPREADS] + [(1, {}, False), (2, {"ddp_size": 2}, False)]


@pytest.mark.parametrize("n_ranks, changes, trained", CASES)
def test_a_forward_without_a_backward_leaves_each_rank_its_part(
    tmp_path, n_ranks, changes, trained
):
    arguments = (make_model(tmp_path), OmegaConf.create(changes), trained, make_batch())
    for split, same in run_on_ranks(n_ranks, read_after_a_forward, *arguments):
        assert split and same
