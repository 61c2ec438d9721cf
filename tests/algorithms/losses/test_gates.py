import math

import pytest
import torch

from RL2.algorithms.losses import LOSSES
from RL2.algorithms.losses.gates import dppo, sapo
from tests.algorithms.losses.support import extremes, gradient, near_policies

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_sapo_by_hand():
    ratio = torch.tensor([1.0, 2.0, 0.5, 2.0, 2.0], dtype=torch.float64)
    advantages = torch.tensor([3.0, 1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    losses, metrics = sapo(ratio.log(), torch.zeros(5), advantages)
    expected = [-6, -4 * sigmoid(1), -4 * sigmoid(-0.5), 4 / 1.05 * sigmoid(1.05), 0]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert metrics["gate"][:2].tolist() == pytest.approx([1, 4 * sigmoid(1) * sigmoid(-1)])
    assert metrics["gate"][3:].tolist() == pytest.approx([4 * sigmoid(1.05) * sigmoid(-1.05)] * 2)
    other = sapo(ratio.log(), torch.zeros(5), advantages, tau_pos=2.0, tau_neg=4.0)[0]
    assert other.tolist() == pytest.approx([-3, -2 * sigmoid(2), -2 * sigmoid(-1), sigmoid(4), 0])


def test_sapo_starts_as_the_policy_gradient_and_fades():
    logps, _, advantages = near_policies()
    same = gradient(lambda x: sapo(x, logps, advantages), logps)
    torch.testing.assert_close(same, -advantages, **CLOSE)
    far = gradient(lambda x: sapo(x, logps - 3, advantages), logps)
    assert (far.abs() < 1e-4).all() and far.all()


# p_old, p, A: masked by TV 0.15, by KL 0.05
CASES = [
    (0.5, 0.7, 1.0, True, True),  # KL = 0.0872
    (0.5, 0.3, 1.0, False, False),  # comes back
    (0.5, 0.3, -1.0, True, True),
    (0.5, 0.7, -1.0, False, False),
    (0.5, 0.6, 1.0, False, False),  # KL = 0.0204
    (1e-4, 1e-2, 1.0, False, False),  # a ratio of 100 is no divergence
    (0.01, 0.13, 1.0, False, True),  # TV = 0.12, KL = 0.1023
    (0.99, 0.85, -1.0, False, True),  # TV = 0.14, KL = 0.1238
    (0.5, 0.7, 0.0, False, False),
    (0.5, 0.3, 0.0, False, False),
]


@pytest.mark.parametrize("divergence, column", [("tv", 3), ("kl", 4)])
def test_dppo_by_hand(divergence, column):
    p_old, p, advantages = (torch.tensor(x).double() for x in list(zip(*CASES, strict=True))[:3])
    masked = torch.tensor([case[column] for case in CASES])
    call = lambda x: dppo(x, p_old.log(), advantages, divergence=divergence)  # noqa: E731
    losses, metrics = call(p.log())
    expected = (-advantages * (p / p_old).clamp(max=20)).masked_fill(masked, 0.0)
    torch.testing.assert_close(losses, expected, **CLOSE)
    assert torch.equal(metrics["clip_ratio"].bool(), masked)
    torch.testing.assert_close(gradient(call, p.log()), expected, **CLOSE)  # of a ratio: itself


def test_dppo_bounds():
    old, now = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.7, 0.7]).log()
    one = torch.ones(2)
    kl = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    for divergence, size in (("tv", 0.2), ("kl", kl)):
        for bound, counts in ((size * 1.01, True), (size * 0.99, False)):
            losses, _ = dppo(now, old, one, divergence=divergence, max_divergence=bound)
            assert losses.any().item() == counts
    capped = dppo(now, old, one, max_divergence=1, max_ratio=1.1)[0]
    assert capped.tolist() == pytest.approx([-1.1, -1.1])
    for options, message in (
        ({"divergence": "js"}, "divergence=js: must be tv or kl"),
        ({"max_divergence": -1}, "max_divergence=-1"),
        ({"max_ratio": 0.5}, "max_ratio=0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            dppo(now, old, one, **options)
    with pytest.raises(ValueError, match="tau_neg=0: must be above 0"):
        sapo(now, old, one, tau_neg=0)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences(seed):
    logps, old_logps, advantages = near_policies(seed)
    sapo_of = lambda x: sapo(x, old_logps, advantages)[0]  # noqa: E731
    leaf = logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(sapo_of, leaf, eps=1e-6, atol=1e-8, rtol=1e-6)

    # dppo: the gradient of -M A r, whose weight is no constant although it is computed as one
    dppo_of = lambda x: dppo(x, old_logps, advantages, max_divergence=0.02)  # noqa: E731
    masked = dppo_of(logps)[1]["clip_ratio"].bool()
    assert masked.any() and not masked.all()
    step = 1e-6
    up, down = (-advantages * (logps + side - old_logps).exp() for side in (step, -step))
    numeric = ((up - down) / (2 * step)).masked_fill(masked, 0.0)
    torch.testing.assert_close(gradient(dppo_of, logps), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name, options", [("sapo", {}), ("dppo", {}), ("dppo", {"divergence": "kl"})]
)
def test_extremes_leave_no_nan(name, options):
    logps, old_logps, advantages = extremes()
    call = lambda x: LOSSES[name](x, old_logps, advantages, **options)  # noqa: E731
    assert call(logps)[0].isfinite().all() and gradient(call, logps).isfinite().all()
