import math

import pytest
import torch

from RL2.algorithms.losses import LOSSES
from RL2.algorithms.losses.policy import ppo
from RL2.algorithms.losses.ratios import cispo, gmpo, gspo, gspo_token
from tests.algorithms.losses.support import (
    OF_TOKEN,
    extremes,
    gradient,
    near_policies,
    sequences,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
TWO = sequences(torch.tensor([0, 0, 1, 1, 1]))
# Means 0.2 and -0.2, s = 1.2214 and 0.8187.
D = torch.tensor([0.1, 0.3, -0.2, -0.5, 0.1], dtype=torch.float64)
OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0], dtype=torch.float64)
UP, DOWN = math.exp(0.2), math.exp(-0.2)


def of_two(first, second):
    return torch.tensor([first, first, second, second, second], dtype=torch.float64)


@pytest.mark.parametrize(
    "advantages, clips, losses, is_clipped",
    [
        ((1, 1), (0.3, 0.3), (-UP, -DOWN), (0, 0)),
        ((1, 1), (0.1, 0.1), (-1.1, -DOWN), (1, 0)),  # what falls is not clipped
        ((-2, -2), (0.1, 0.1), (2 * UP, 1.8), (0, 1)),
        ((-2, 2), (0.1, 0.1), (2 * UP, -2 * DOWN), (0, 0)),
        ((0, 0), (0.1, 0.1), (0, 0), (0, 0)),
    ],
)
def test_gspo_by_hand(advantages, clips, losses, is_clipped):
    low, high = clips
    found, metrics = gspo(OLD + D, OLD, of_two(*advantages), TWO, clip_low=low, clip_high=high)
    assert found.tolist() == pytest.approx(losses)
    assert metrics["clip_ratio"].tolist() == list(is_clipped)


def test_gspo_clips_as_the_paper_by_default():
    d = torch.tensor([3.5e-4, 4.5e-4, -2.5e-4, -3.5e-4], dtype=torch.float64)
    of_one = sequences(torch.arange(4))
    up = gspo(d - 1, torch.full_like(d, -1), torch.ones_like(d), of_one)[1]["clip_ratio"]
    down = gspo(d - 1, torch.full_like(d, -1), -torch.ones_like(d), of_one)[1]["clip_ratio"]
    assert up.tolist() == [0, 1, 0, 0] and down.tolist() == [0, 0, 0, 1]


def test_gspo_token_is_gspo_where_advantages_are_equal():
    logps, old_logps, advantages = near_policies()
    whole = sequences()
    options = {"clip_low": 0.2, "clip_high": 0.3}
    of_tokens, clip = gspo_token(logps, old_logps, advantages, whole, **options)
    of_sequences, clips = gspo(logps, old_logps, advantages, whole, **options)
    torch.testing.assert_close(of_tokens, of_sequences[OF_TOKEN], **CLOSE)
    assert torch.equal(clip["clip_ratio"], clips["clip_ratio"][OF_TOKEN])
    assert 0 < clip["clip_ratio"].sum() < len(OF_TOKEN)

    def mean_of_each(x):
        losses, metrics = gspo_token(x, old_logps, advantages, whole, **options)
        return whole.mean(losses), metrics

    torch.testing.assert_close(
        gradient(mean_of_each, logps),
        gradient(lambda x: gspo(x, old_logps, advantages, whole, **options), logps),
        **CLOSE,
    )


def test_gspo_token_by_hand():
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.0, -2.0], dtype=torch.float64)
    loss = lambda x: gspo_token(x, OLD, advantages, TWO, clip_low=0.1, clip_high=0.1)  # noqa: E731
    assert loss(OLD + D)[0].tolist() == pytest.approx([-1.1, UP, -2 * DOWN, 0, 1.8])
    # clipped: 1.1 > and 0.9 >; else -A s
    assert gradient(loss, OLD + D).tolist() == pytest.approx([0, UP, -2 * DOWN, 0, 0])


def test_gmpo_by_hand():
    """d = 0.1 0.3 | -0.2 -0.5 0.1 with bounds of 0.25 and 0.4 on the logarithms."""
    options = {"clip_low": 0.25, "clip_high": 0.25}
    found, metrics = gmpo(OLD + D, OLD, of_two(2, 2), TWO, **options)
    assert found.tolist() == pytest.approx([-2 * math.exp(0.35 / 2), -2 * math.exp(-0.6 / 3)])
    assert metrics["clip_ratio"].tolist() == [0.5, 0]
    found, metrics = gmpo(OLD + D, OLD, of_two(-2, -2), TWO, **options)
    assert found.tolist() == pytest.approx([2 * UP, 2 * math.exp(-0.35 / 3)])
    assert metrics["clip_ratio"].tolist() == [0, pytest.approx(1 / 3)]
    options = {"clip_low": 0.15, "clip_high": 0.25}
    found = gmpo(OLD + D, OLD, of_two(2, -2), TWO, **options)[0]
    assert found.tolist() == pytest.approx([-2 * math.exp(0.35 / 2), 2 * math.exp(-0.2 / 3)])
    assert gmpo(OLD + D, OLD, of_two(-2, 2), TWO)[0].tolist() == pytest.approx([2 * UP, -2 * DOWN])
    assert not gmpo(OLD + D, OLD, of_two(0, 0), TWO)[0].any()
    half = gmpo(OLD + 5 * D, OLD, of_two(1, -1), TWO)[0]  # the default, 0.4
    assert half.tolist() == pytest.approx([-math.exp(0.8 / 2), math.exp((-0.4 - 0.4 + 0.5) / 3)])


def test_cispo_by_hand():
    ratio = torch.tensor([1.0, 2.0, 8.0, 8.0, 0.01], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    logps = OLD + ratio.log()
    losses, metrics = cispo(logps, OLD, advantages, clip_high=1.5)
    bounded = torch.tensor([1.0, 2.0, 2.5, 2.5, 0.01], dtype=torch.float64)
    torch.testing.assert_close(losses, -bounded * advantages * logps, **CLOSE)
    assert metrics["clip_ratio"].tolist() == [0, 0, 1, 1, 0]
    found = gradient(lambda x: cispo(x, OLD, advantages, clip_high=1.5), logps)
    torch.testing.assert_close(found, -bounded * advantages, **CLOSE)  # none is 0
    assert cispo(logps, OLD, advantages)[0][2].item() == pytest.approx(-5 * logps[2].item())


def test_dual_clip_by_hand():
    ratio = torch.tensor([2.0, 4.0, 2.0, 4.0, 0.5], dtype=torch.float64)
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    loss = lambda x: ppo(x, OLD, advantages, dual_clip=3)  # noqa: E731
    losses, metrics = loss(OLD + ratio.log())
    assert losses.tolist() == pytest.approx([2, 3, -1.2, -1.2, 0.8])
    assert metrics["clip_ratio"].tolist() == [0, 1, 1, 1, 1]
    assert gradient(loss, OLD + ratio.log()).tolist() == pytest.approx([2, 0, 0, 0, 0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "loss", [gspo, gmpo, lambda *x: ppo(*x[:3], dual_clip=1.5)], ids=["gspo", "gmpo", "ppo"]
)
def test_gradients_against_finite_differences(loss, seed):
    logps, old_logps, advantages = near_policies(seed)
    if loss is gspo:
        loss = lambda *x: gspo(*x, clip_low=0.1, clip_high=0.1)  # noqa: E731
    call = lambda x: loss(x, old_logps, advantages, sequences())[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, logps.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


def naive(name, logps, old_logps, advantages):
    """Sequence by sequence, as the papers write it."""
    found = []
    for one in range(4):
        own = OF_TOKEN == one
        p, q, a = logps[own].exp(), old_logps[own].exp(), advantages[own][0]
        if name == "gspo":
            s = (p / q).prod() ** (1 / int(own.sum()))
            found.append(-min(s * a, s.clamp(0.9, 1.2) * a))
        else:
            sign = a.sign()
            powers = (p / q) ** sign
            inner = torch.minimum(powers, powers.clamp(math.exp(-0.3), math.exp(0.3))) ** sign
            found.append(-(inner.prod() ** (1 / int(own.sum()))) * a)
    return torch.stack(found)


@pytest.mark.parametrize("seed", range(5))
def test_values_equal_the_definitions(seed):
    given = near_policies(seed)
    found = gspo(*given, sequences(), clip_low=0.1, clip_high=0.2)[0]
    torch.testing.assert_close(found, naive("gspo", *given), **CLOSE)
    found = gmpo(*given, sequences(), clip_low=0.3, clip_high=0.3)[0]
    torch.testing.assert_close(found, naive("gmpo", *given), **CLOSE)


@pytest.mark.parametrize("name", ["ppo", "gspo", "gspo_token", "gmpo", "cispo"])
def test_extremes_leave_no_nan(name):
    logps, old_logps, advantages = extremes()
    given = [sequences(torch.arange(len(logps)))] if name in ("gspo", "gspo_token", "gmpo") else []
    call = lambda x: LOSSES[name](x, old_logps, advantages, *given)  # noqa: E731
    losses, metrics = call(logps)
    assert losses.isfinite().all() and metrics["clip_ratio"].isfinite().all()
    assert gradient(call, logps).isfinite().all()
    assert not losses[advantages == 0].any()


@pytest.mark.parametrize("name", ["ppo", "gspo", "gspo_token", "gmpo", "cispo"])
def test_no_gradient_but_for_logps(name):
    logps, old_logps, advantages = near_policies()
    leaves = [x.requires_grad_() for x in (logps, old_logps, advantages)]
    given = [sequences()] if name in ("gspo", "gspo_token", "gmpo") else []
    LOSSES[name](leaves[0], old_logps.detach(), advantages.detach(), *given)[0].sum().backward()
    assert leaves[0].grad.any() and leaves[1].grad is None and leaves[2].grad is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda *x: gspo(*x, TWO, clip_low=-1), "clip_low=-1"),
        (lambda *x: gmpo(*x, TWO, clip_high=-0.1), "clip_high=-0.1"),
        (lambda *x: cispo(*x, clip_high=-0.1), "clip_high=-0.1"),
        (lambda *x: ppo(*x, dual_clip=1.0), "dual_clip=1.0: must be above 1"),
    ],
)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(OLD, OLD, OLD)
