"""What a critic learns, against the formula in float64 and finite differences."""

import torch

from RL2.algorithms.losses.values import value

# Inside of the clip; beyond it and away from the return; beyond it and towards the return; no move.
OLD = torch.tensor([0.5, 0.5, 0.5, -1.0], dtype=torch.float64)
NOW = torch.tensor([0.7, 1.5, -0.5, -1.0], dtype=torch.float64)
RETURNS = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)


def test_the_larger_of_the_two_errors_counts():
    losses, metrics = value(NOW, OLD, RETURNS)
    # 0.3², 1.5² (clipped it would be 1²), clipped to 0: 1² (not 0.5²), 1²
    torch.testing.assert_close(losses, torch.tensor([0.09, 2.25, 1.0, 1.0]).double())
    assert metrics["clip_ratio"].tolist() == [0, 0, 1, 0]
    narrow, metrics = value(NOW, OLD, RETURNS, clip=0.1)
    torch.testing.assert_close(narrow, torch.tensor([0.16, 2.25, 1.96, 1.0]).double())
    assert metrics["clip_ratio"].tolist() == [1, 0, 1, 0]


def test_what_is_within_the_clip_is_not_clipped_by_rounding():
    """In float32 -0.2 + (0.01 - -0.2) is not 0.01, and further from 0."""
    now, old = torch.tensor([0.01]), torch.tensor([-0.2])
    losses, metrics = value(now, old, torch.zeros(1))
    assert losses == now.square() and metrics["clip_ratio"] == 0


def test_its_gradient_is_that_of_the_formula():
    """None where the clipped error counts: the value has gone far enough."""
    values = NOW.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value(v, OLD, RETURNS)[0], values)
    value(values, OLD, RETURNS)[0].sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.6, 3.0, 0.0, -2.0]).double())
