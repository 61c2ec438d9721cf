"""Ranks whose copies of a weight differ by a bit do not begin to train."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from RL2.distributed import rank
from RL2.models.copies import check_copies
from tests.ranks import run_on_ranks

SPREADS = {"plain": None, "copied": [Replicate()], "sharded": [Shard(0)]}


def outcome(spread: str, changed: bool) -> str:
    model = nn.Linear(4, 6, bias=False)
    weight = torch.arange(24.0).view(6, 4)
    if placements := SPREADS[spread]:
        weight = distribute_tensor(weight, init_device_mesh("cpu", (2,)), placements)
    model.weight = nn.Parameter(weight)
    if changed and rank() == 1:  # the lowest bit of a number
        local = model.weight.data.to_local() if placements else model.weight.data
        local.view(torch.int32)[1, 2] ^= 1
    try:
        check_copies(model, "a/model")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("spread", SPREADS)
def test_copies_that_differ(spread):
    assert run_on_ranks(2, outcome, spread, False) == ["", ""]
    said = run_on_ranks(2, outcome, spread, True)
    if spread == "sharded":  # no rank has what another one has
        assert said == ["", ""]
        return
    assert said[0] == said[1] and said[0].startswith("ConfigError: actor.model_name=a/model: rank")
    assert " have read different numbers for weight; give all ranks the same files" in said[0]
    assert "rank 0 on " in said[0] and "rank 1 on " in said[0]


def test_one_rank_has_no_copies():
    check_copies(nn.Linear(2, 2), "a/model")
