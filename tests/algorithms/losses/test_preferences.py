import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from RL2.algorithms.losses.preferences import (
    bradley_terry,
    dpo,
    dpop,
    ipo,
    kto,
    orpo,
    simpo,
)
from RL2.algorithms.segments import segments_of

PAIRED = {"dpo": dpo, "dpop": dpop, "ipo": ipo, "simpo": simpo, "orpo": orpo}
OF_A_REFERENCE = ("dpo", "dpop", "ipo")


def layout(*sizes):
    """Sequences of these many tokens: chosen, rejected, chosen, rejected, …"""
    n = torch.arange(len(sizes))
    rows = {"sample_ids": n, "pair_ids": n // 2, "chosen": n % 2 == 0}
    row = n.repeat_interleave(torch.tensor(sizes))
    return segments_of(row, rows, ("sequences", "pairs"), "cpu")


def spread(*sums, sizes):
    """Tokens whose log-probabilities add up to `sums`, all different."""
    parts = []
    for total, size in zip(sums, sizes, strict=True):
        shares = torch.arange(1, size + 1).double()
        parts.append(total * shares / shares.sum())
    return torch.cat(parts)


def call(name, logps, ref, found, **options):
    given = (logps, ref) if name in OF_A_REFERENCE else (logps,)
    return PAIRED[name](*given, found["sequences"], found["pairs"], **options)


def close(found, *expected, tolerance=1e-5):
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


# ---------------------------------------------------------------- worked out by hand

# Summed log-probabilities: chosen -10 (reference -11), rejected -14 (reference -13).
SIZES = (2, 3)


def by_hand(name, chosen=-10.0, **options):
    logps, ref = spread(chosen, -14.0, sizes=SIZES), spread(-11.0, -13.0, sizes=SIZES)
    losses, metrics = call(name, logps, ref, layout(*SIZES), **options)
    return losses, {key: x.item() for key, x in metrics.items()}


def test_dpo():
    losses, metrics = by_hand("dpo")
    close(losses, 0.59814)  # z = 2
    assert metrics == pytest.approx(
        {
            "chosen_rewards": 0.1, "rejected_rewards": -0.1, "margin": 0.2, "accuracy": 1,
            "chosen_logps": -10, "rejected_logps": -14,
        }
    )  # fmt: skip
    close(by_hand("dpo", label_smoothing=0.1)[0], 0.61814)


def test_dpop():
    losses, metrics = by_hand("dpop", chosen=-11.2)
    close(losses, 1.25541)  # z = 0.8 - 50 * 0.2
    assert metrics["penalty"] == pytest.approx(0.2)
    assert metrics["margin"] == pytest.approx(0.08)  # of the rewards: without the penalty
    close(by_hand("dpop")[0], 0.59814)  # -10 is above the reference
    z = 0.8 - 3 * 0.2
    smooth = 0.8 * math.log(1 + math.exp(-z / 10)) + 0.2 * math.log(1 + math.exp(z / 10))
    options = {"dpop_lambda": 3.0, "label_smoothing": 0.2}
    close(by_hand("dpop", chosen=-11.2, **options)[0], smooth)


def test_ipo():
    close(by_hand("ipo")[0], 9.0)
    # means: 1/2 - (-1/3) = 5/6
    close(by_hand("ipo", length_normalized=True)[0], (5 / 6 - 5) ** 2)


def test_simpo():
    # means -5 and -14/3: the difference is -1/3
    losses, metrics = by_hand("simpo", beta=2.0, gamma=0.5)
    close(losses, math.log(1 + math.exp(2 / 3 + 0.5)))
    assert metrics["accuracy"] == 0 and metrics["margin"] == pytest.approx(-2 / 3)
    smooth = by_hand("simpo", beta=2.0, gamma=0.5, label_smoothing=0.25)[0]
    close(smooth, math.log(1 + math.exp(7 / 6)) - 0.25 * 7 / 6)


def test_orpo():
    logps = spread(2 * math.log(0.8), 3 * math.log(0.5), sizes=SIZES)
    losses, metrics = call("orpo", logps, None, layout(*SIZES), beta=0.3)
    assert metrics["odds_ratio"].item() == pytest.approx(math.log(4))  # odds 4 and 1
    close(losses, -math.log(0.8) + 0.3 * math.log(1.25))  # sigmoid(log 4) = 4 / 5
    assert metrics["chosen_rewards"].item() == pytest.approx(0.3 * math.log(0.8))


def test_kto():
    found = layout(2, 3, 1)["sequences"]
    logps, ref = spread(-10.0, -14.0, -2.0, sizes=(2, 3, 1)), spread(-11, -13, -2, sizes=(2, 3, 1))
    labels = torch.tensor([1.0, 1, -1, -1, -1, 1])
    losses, metrics = kto(
        logps, ref, labels, torch.full_like(logps, 0.5), found,
        beta=0.2, desirable_weight=2.0, undesirable_weight=3.0,
    )  # fmt: skip
    gains = [0.2 * (1 - 0.5), 0.2 * (0.5 + 1), 0.2 * (0 - 0.5)]
    expected = [w / (1 + math.exp(g)) for w, g in zip((2, 3, 2), gains, strict=True)]
    close(losses, *expected)
    assert metrics["accuracy"].tolist() == [True, True, False]
    close(metrics["rewards"], 0.2, -0.2, 0.0)


def test_bradley_terry():
    found, values = layout(1, 1, 1, 1), torch.tensor([2.0, 0.5, -1.0, -1.0])
    losses, metrics = bradley_terry(values, found["sequences"], found["pairs"])
    close(losses, math.log(1 + math.exp(-1.5)), math.log(2))
    assert metrics["accuracy"].tolist() == [True, False]  # equal scores are not right
    centred, _ = bradley_terry(
        values, found["sequences"], found["pairs"], center_rewards_coefficient=0.01
    )
    close(centred - losses, 0.01 * 6.25, 0.01 * 4)


# ---------------------------------------------------------------- definitions and gradients


def batch(seed, sizes=(3, 1, 2, 4, 5, 2)):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(sum(sizes), generator=generator).double()  # noqa: E731
    logps = -draw().exp()
    return layout(*sizes), logps, logps + 0.3 * draw(), [*sizes]


def naive(name, logps, ref, sizes, eps):
    """One pair after the other."""
    parts, others, losses = logps.split(sizes), ref.split(sizes), []
    for i in range(0, len(sizes), 2):
        c, r = parts[i], parts[i + 1]
        z = (c - others[i]).sum() - (r - others[i + 1]).sum()
        if name == "dpop":
            z = z - 5 * max(0.0, (others[i] - c).sum())
        if name in ("dpo", "dpop"):
            x = 0.3 * z
        elif name == "simpo":
            x = 0.3 * (c.mean() - r.mean()) - 0.7
        elif name == "orpo":
            odds = [p.mean().exp() / (1 - p.mean().exp()) for p in (c, r)]
            losses.append(-c.mean() - 0.3 * torch.sigmoid((odds[0] / odds[1]).log()).log())
            continue
        else:
            losses.append((z - 1 / 0.6) ** 2)
            continue
        losses.append(-(1 - eps) * torch.sigmoid(x).log() - eps * torch.sigmoid(-x).log())
    return torch.stack(losses)


OPTIONS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "dpop": {"beta": 0.3, "label_smoothing": 0.1, "dpop_lambda": 5.0},
    "ipo": {"beta": 0.3},
    "simpo": {"beta": 0.3, "gamma": 0.7, "label_smoothing": 0.1},
    "orpo": {"beta": 0.3},
}


@pytest.mark.parametrize("name", PAIRED)
def test_values_and_gradients_are_those_of_pairs_one_by_one(name):
    for seed in range(3):
        found, logps, ref, sizes = batch(seed)
        leaf, other = logps.clone().requires_grad_(), logps.clone().requires_grad_()
        losses, _ = call(name, leaf, ref, found, **OPTIONS[name])
        expected = naive(name, other, ref, sizes, 0.1)
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
        losses.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*PAIRED, "kto", "bradley_terry"])
def test_gradients_against_finite_differences(name):
    found, logps, ref, _ = batch(7)
    labels = found["sequences"].spread(torch.tensor([1.0, 1, -1, 1, -1, -1]))
    kl = torch.full_like(logps, 0.2)

    def loss(x):
        if name == "kto":
            return kto(x, ref, labels, kl, found["sequences"], desirable_weight=1.5)[0]
        if name == "bradley_terry":
            own = found["sequences"], found["pairs"]
            return bradley_terry(x, *own, center_rewards_coefficient=0.1)[0]
        return call(name, x, ref, found, **OPTIONS[name])[0]

    assert torch.autograd.gradcheck(loss, logps.requires_grad_(), eps=1e-6, atol=1e-7)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRED)
def test_extreme_log_probabilities_leave_finite_losses_and_gradients(name, dtype):
    found = layout(2, 2, 2, 2, 2, 2)
    # Certain answers, hopeless ones, and one of each.
    logps = torch.tensor([0, 0, 0, 0, 0, 0, -1e4, -1e4, -1e4, -1e4, 0, 0], dtype=dtype)
    leaf = logps.requires_grad_()
    losses, metrics = call(name, leaf, torch.full_like(logps, -5.0), found)
    losses.sum().backward()
    assert losses.isfinite().all() and leaf.grad.isfinite().all()
    assert all(x.isfinite().all() for x in metrics.values())


def test_odds_have_their_digits_near_one():
    """1 - p in fp32 has none left at log p = -1e-6; the log odds have all."""
    means = torch.tensor([-1e-6, -1e-3, -0.6, -0.8, -30.0])
    logps = torch.stack([means, torch.full_like(means, -1.0)], -1).flatten().requires_grad_()
    losses, metrics = call("orpo", logps, None, layout(*[1] * 10))
    exact = torch.stack([means, torch.full_like(means, -1.0)]).double()
    odds = exact - (-exact.expm1()).log()
    torch.testing.assert_close(
        metrics["odds_ratio"].double(), odds[0] - odds[1], rtol=2e-6, atol=1e-6
    )
    losses.sum().backward()
    slope = (odds[1] - odds[0]).sigmoid() / -exact[0].expm1()
    chosen = -1 - 0.1 * slope
    torch.testing.assert_close(logps.grad[::2].double(), chosen, rtol=1e-5, atol=1e-6)


def test_a_label_smoothing_beyond_a_half_is_refused():
    for name in ("dpo", "dpop", "simpo"):
        with pytest.raises(ValueError, match="label_smoothing=0.5: must be 0 or more and below"):
            by_hand(name, label_smoothing=0.5)


def test_half_the_smoothing_of_both_labels_is_the_loss_of_neither():
    found, logps, ref, _ = batch(1)
    one = call("dpo", logps, ref, found, label_smoothing=0.25)[0]
    z = 0.1 * found["pairs"].difference(found["sequences"].sum(logps - ref))
    torch.testing.assert_close(one, -0.75 * logsigmoid(z) - 0.25 * logsigmoid(-z))
