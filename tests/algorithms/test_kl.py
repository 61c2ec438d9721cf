import math

import pytest
import torch

from RL2.algorithms import KL_ESTIMATORS, approx_kl


def test_by_hand():
    logps, ref = torch.tensor([-1.0, 0.0]), torch.tensor([-1.5, 0.0])
    assert approx_kl(logps, ref, "k1").tolist() == [0.5, 0]
    assert approx_kl(logps, ref, "k2").tolist() == [0.125, 0]
    assert approx_kl(logps, ref, "k3").tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, 0])


def test_expectations_under_the_policy():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    kl = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):  # unbiased
        torch.testing.assert_close((p * approx_kl(p.log(), q.log(), name)).sum(), kl)


def test_k3_keeps_its_digits_for_small_differences():
    d = torch.tensor([1e-3, -1e-3])
    k3 = approx_kl(d, torch.zeros(2), "k3")
    assert (k3 >= 0).all()
    torch.testing.assert_close(k3, d.square() / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_gradients(name):
    logps, ref = torch.randn(2, 20, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: approx_kl(x, ref, name), logps.requires_grad_())


def test_clamped_estimates_have_no_gradient_and_no_nan():
    """d = 0.5 is inside; k3 of -200 overflows, of -3 it is 16.1; k1 of -200 and -3 is below 0."""
    ref = torch.tensor([0.0, 200.0, 3.0, 0.0])
    logps = torch.tensor([0.5, 0.0, 0.0, 0.0], requires_grad=True)
    k3 = approx_kl(logps, ref, "k3", clamp=10.0)
    assert k3.tolist() == [pytest.approx(math.exp(-0.5) - 0.5), 10, 10, 0]
    assert torch.autograd.grad(k3.sum(), logps)[0].tolist() == [
        pytest.approx(1 - math.exp(-0.5)), 0, 0, 0,
    ]  # fmt: skip
    k1 = approx_kl(logps, ref, "k1", clamp=10.0)
    assert k1.tolist() == [0.5, 0, 0, 0]
    assert torch.autograd.grad(k1.sum(), logps)[0].tolist() == [1, 0, 0, 1]
