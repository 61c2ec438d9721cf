"""The contestants do the work that they are compared by."""

import pytest

from benchmarks.sequence_losses import Head, timed


@pytest.mark.parametrize("name", ["tokens", "gspo", "dpo"])
def test_every_token_owes_a_gradient(name):
    head = Head(64, 16, 101, "cpu")
    assert min(timed(head, getattr(head, name))) >= 0
    assert (head.hidden.grad != 0).any(-1).all()
    assert (head.weight.grad != 0).any()
