"""How well values foretold returns, by hand; `tests/invariance/test_values.py` has the updates."""

import pytest
import torch

from RL2.workers.critic import explained_variance


def test_explained_variance():
    mask = torch.tensor([[True, True, True, False]])
    batch = {"action_mask": mask, "returns": torch.tensor([[0.0, 1.0, 2.0, 9.0]])}
    # the last errors are -1, 0 and 0.5, whose variance is 7/18; that of the returns is 2/3
    for values, expected in (([0, 1, 2, 0], 1), ([5, 5, 5, 0], 0), ([1, 1, 1.5, 3], 5 / 12)):
        batch["old_values"] = torch.tensor([values]).float()
        assert explained_variance(batch) == pytest.approx(expected)
    assert explained_variance(batch | {"returns": torch.ones(1, 4)}) is None
