"""Advantages from values, against numbers worked out by hand."""

import pytest
import torch

from RL2.algorithms.advantages.gae import gae
from RL2.algorithms.advantages.returns import rewards_to_go

MASK = torch.tensor([[False, True, True, True]])
VALUES = torch.tensor([[9.0, 0.5, 0.6, 0.2]])
REWARDS = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
ONE = torch.tensor([4])


def unnormalised(rewards, values, mask, samples, **options):
    """Returns are A + V before the advantages are normalised."""
    _, more = gae(rewards, values, mask, samples, **options)
    return (more["returns"] - values.double())[mask].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.4, 0.8]),
        ({"lamda": 0.0}, [0.1, -0.4, 0.8]),
        ({"lamda": 0.5}, [0.1, 0.0, 0.8]),
        ({"gamma": 0.5}, [-0.25, -0.1, 0.8]),
        # d = -0.2, -0.5, 0.8, each next one times 0.25
        ({"gamma": 0.5, "lamda": 0.5}, [-0.275, -0.3, 0.8]),
    ],
)
def test_by_hand(options, expected):
    found = unnormalised(REWARDS, VALUES, MASK, ONE, **options)
    assert found == pytest.approx(expected, abs=1e-7)
    normalised, _ = gae(REWARDS, VALUES, MASK, ONE, **options)
    a = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(normalised[MASK], (a - a.mean()) / a.std(), rtol=1e-6, atol=1e-6)
    assert normalised[0, 0] == 0


def test_time_runs_over_the_actions_of_a_sample_and_no_other_tokens():
    """The same three steps: with tokens of an environment between them, and as two rows around a
    row of another sample."""
    apart = torch.tensor([[True, False, False, True, False, True]])
    values, rewards = torch.full((1, 6), 9.0), torch.zeros(1, 6)
    values[apart], rewards[0, 5] = torch.tensor([0.5, 0.6, 0.2]), 1.0
    assert unnormalised(rewards, values, apart, ONE) == pytest.approx([0.5, 0.4, 0.8])

    mask = torch.tensor([[True, False], [True, True], [True, True]])
    values = torch.tensor([[0.5, 9.0], [0.25, 0.5], [0.6, 0.2]])
    rewards = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    found = unnormalised(rewards, values, mask, torch.tensor([7, 3, 7]))
    assert found == pytest.approx([0.5, 1.75, 1.5, 0.4, 0.8])
    options = {"gamma": 0.5, "lamda": 0.5}
    found = unnormalised(rewards, values, mask, torch.tensor([7, 3, 7]), **options)
    assert found == pytest.approx([-0.275, 0.375, 1.5, -0.3, 0.8])


def test_equal_advantages_and_a_batch_without_actions_are_zero():
    zeros = torch.zeros(1, 4)
    for mask in (MASK, torch.zeros_like(MASK), torch.tensor([[True, False, False, False]])):
        advantages, more = gae(zeros + 0.1, zeros, mask, ONE, lamda=0.0)
        assert not advantages.any() and more["returns"].shape == mask.shape
    third = torch.full((1, 4), 0.1)  # 0.1 + 0.2 - 0.3 is not 0
    advantages, _ = gae(third, torch.tensor([[0.0, 0.3, 0.2, 0.1]]), MASK, ONE)
    assert not advantages.any()


def test_rewards_to_go():
    found = rewards_to_go(REWARDS + 1.0 * MASK, MASK, ONE, 0.5)
    assert found.tolist() == [[0.0, 2.0, 2.0, 2.0]]
    two = rewards_to_go(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), ONE.repeat(2), 1.0)
    assert two.tolist() == [[4.0, 3.0], [2.0, 1.0]]
