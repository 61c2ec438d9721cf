"""Distances to a teacher on its k likeliest tokens: by hand, and against the whole vocabulary."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from RL2.algorithms import resolve_loss
from RL2.algorithms.losses.distillation import topk_jsd, topk_kl
from RL2.ops.token_stats import NEG_INF, token_stats
from RL2.runtime.errors import ConfigError

LOSSES = {
    "kl": topk_kl,
    "kl without rest": lambda p, q: topk_kl(p, q, rest=False),
    **{
        f"jsd {beta}": lambda p, q, beta=beta: topk_jsd(p, q, jsd_beta=beta)
        for beta in (0.0, 0.1, 0.5, 0.9, 1.0)
    },
    "jsd without rest": lambda p, q: topk_jsd(p, q, rest=False),
}


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def of(loss, p, q):
    return LOSSES[loss](p, q)[0]


def policies(n=20, V=30, seed=0, scale=2.0, dtype=torch.float64):
    """Logits of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    p, q = scale * torch.randn(2, n, V, generator=generator, dtype=torch.float64)
    return p.to(dtype), q.to(dtype)


def at_top(p, q, k):
    """log p and log q of the teacher's k likeliest tokens."""
    teacher = token_stats(q, q[:, 0].long() * 0, 1.0, ["top_logps", "top_ids"], k)
    student = token_stats(p, p[:, 0].long() * 0, 1.0, ["at_logps"], at=teacher.top_ids)
    return student.at_logps, teacher.top_logps


def whole(name, p, q):
    """The divergence over the whole vocabulary, as it is written down."""
    p, q = log_softmax(p, -1).exp(), log_softmax(q, -1).exp()

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    beta = float(name.split()[1]) if name.startswith("jsd") else 0.0
    if beta in (0.0, 1.0):
        return kl(p, q) if beta else kl(q, p)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def test_by_hand():
    """q = 1/2 1/4 and 1/4 for the rest, p = 1/4 1/4 and 1/2."""
    p, q = logs([0.25, 0.25]), logs([0.5, 0.25])
    two = math.log(2)
    found = {name: of(name, p, q).item() for name in LOSSES}
    assert found["kl"] == pytest.approx(0.5 * two - 0.25 * two)
    assert found["jsd 0.0"] == found["kl"]
    assert found["jsd 1.0"] == pytest.approx(-0.25 * two + 0.5 * two)
    # m = 3/8 1/4 3/8
    m = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert found["jsd 0.5"] == pytest.approx(m)
    # divided by their sums: q = 2/3 1/3, p = 1/2 1/2
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert found["kl without rest"] == pytest.approx(expected)
    assert topk_kl(p, q)[1]["teacher_mass"].item() == pytest.approx(0.75)


@pytest.mark.parametrize("name", [name for name in LOSSES if "rest" not in name])
def test_exact_over_the_whole_vocabulary_and_never_more_with_fewer_tokens(name):
    p, q = policies()
    exact, before = whole(name, p, q), torch.zeros(20, dtype=torch.float64)
    for k in (1, 3, 10, 29, 30, 40):  # beyond 30 there are no tokens
        found = of(name, *at_top(p, q, k))
        assert (found >= before - 1e-12).all() and (found <= exact + 1e-12).all()
        before = found
    torch.testing.assert_close(before, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name):
    """Through the head, as finite differences have it; exactly 0 or next to it at the teacher."""
    p, q = policies(n=4, V=6)
    p.requires_grad_()
    for k in (2, 6):
        assert torch.autograd.gradcheck(lambda p, k=k: of(name, *at_top(p, q, k)), p)
    (gradient,) = torch.autograd.grad(of(name, *at_top(p, p.detach(), 3)).sum(), p)
    assert gradient.abs().max() < 1e-12
    assert of(name, *at_top(p, p.detach(), 3)).abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_extreme_policies(name, scale):
    """fp32 stays near float64, and finite, where the rest is next to nothing."""
    p, q = policies(scale=scale)
    for k in (1, 5, 30):
        exact = of(name, *at_top(p, q, k))
        low = p.float().requires_grad_()
        found = of(name, *at_top(low, q.float(), k))
        (gradient,) = torch.autograd.grad(found.sum(), low)
        assert gradient.isfinite().all() and found.isfinite().all()
        # A rest below 2e-6 is taken for 2e-6: log(p of the rest) stops there.
        tolerance = 1e-4 if scale == 1 or "without" in name else 200.0
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=tolerance)
        assert (found > -1e-4).all()


def test_tokens_that_are_missing_or_impossible():
    q = logs([0.75, 0.25]).clone()
    q = torch.cat([q, torch.full((1, 1), NEG_INF)], -1)
    for student in (-3.0, NEG_INF):  # whatever stands there
        p = torch.cat([logs([0.5, 0.25]), torch.full((1, 1), student)], -1).requires_grad_()
        for name in LOSSES:
            loss = of(name, p, q)
            (gradient,) = torch.autograd.grad(loss.sum(), p)
            assert loss.isfinite().all() and gradient.isfinite().all() and gradient[0, 2] == 0
    # A token of the teacher that the student can not write: infinitely far for KL, not for JSD.
    p, q = torch.tensor([[math.log(0.5), NEG_INF]]), logs([0.5, 0.25]).float()
    assert topk_kl(p, q)[0].item() == math.inf
    assert topk_jsd(p, q)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("which", [0, 1])
def test_no_nan_is_hidden(name, which):
    inputs = [logs([0.5, 0.25], [0.5, 0.25]), logs([0.25, 0.5], [0.25, 0.5])]
    inputs[which][0, 1] = math.nan
    losses = of(name, *inputs)
    assert losses[0].isnan() and losses[1].isfinite()


def test_what_it_needs_and_takes():
    loss = resolve_loss({"name": "topk_jsd", "jsd_beta": 0.3, "rest": False})
    assert loss.statistics == ("at_logps",)
    assert loss.fields == ("teacher_top_logps", "teacher_top_ids")
    with pytest.raises(ConfigError, match="jsd_beta=2: must lie between 0 and 1"):
        resolve_loss({"name": "topk_jsd", "jsd_beta": 2})
    with pytest.raises(ConfigError, match="jsd_beta"):
        resolve_loss({"name": "topk_kl", "jsd_beta": 0.5})
