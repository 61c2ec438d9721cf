from enum import StrEnum

import pytest
import torch

from RL2.algorithms import AVG_LEVELS, token_weights, weighted_sum

# Four rows of 3, 1, 2 and 0 action tokens; rows 0, 2 (and the empty row 3) are correct or not.
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
LOSSES = torch.tensor([[1.0, 2, 99, 3], [99, 5, 99, 99], [7, 8, 99, 99], [99, 99, 99, 99]])


def batch_loss(avg_level, correct, factor=1.0):
    weights = token_weights(MASK, torch.tensor(correct).bool(), avg_level)
    assert not weights[~MASK].any()
    return weighted_sum(LOSSES * factor, weights).item()


def test_token():
    adv = torch.tensor([[1.0], [0], [2], [0]])
    assert batch_loss("token", [1, 0, 1, 0], adv) == pytest.approx((6 + 0 + 30) / 6)


def test_sequence():
    # incorrect sequences weigh 0 through their advantage and count in the divisor, as do empty ones
    adv = torch.tensor([[1.0], [0], [1], [0]])
    assert batch_loss("sequence", [1, 0, 1, 0], adv) == pytest.approx((6 / 3 + 0 + 15 / 2 + 0) / 4)


def test_correct():
    assert batch_loss("correct", [1, 0, 1, 0]) == pytest.approx((6 / 3 + 15 / 2) / 2)
    assert batch_loss("correct", [0, 1, 0, 0]) == pytest.approx(5)
    # a correct row without action tokens is an element of C
    assert batch_loss("correct", [1, 0, 0, 1]) == pytest.approx((6 / 3) / 2)


# Rows 0 and 2 are one sample, of several turns that do not continue each other.
SAMPLES = torch.tensor([7, 3, 7, 0])


def test_a_sample_of_several_rows_weighs_as_much_as_any_other():
    correct = torch.tensor([1, 1, 1, 0]).bool()
    sequence = token_weights(MASK, correct, "sequence", SAMPLES)
    assert sequence.sum(-1).tolist() == pytest.approx([3 / 5 / 3, 1 / 3, 2 / 5 / 3, 0])
    only_correct = token_weights(MASK, correct, "correct", SAMPLES)
    assert only_correct.sum(-1).tolist() == pytest.approx([3 / 5 / 2, 1 / 2, 2 / 5 / 2, 0])
    token = token_weights(MASK, correct, "token", SAMPLES)
    assert torch.equal(token, token_weights(MASK, correct, "token"))


@pytest.mark.parametrize("avg_level", AVG_LEVELS)
def test_cutting_a_sample_into_rows_changes_no_weight(avg_level):
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(5, 12, generator=generator) < 0.6
    correct = torch.tensor([1, 0, 1, 1, 0]).bool()
    expected = token_weights(whole, correct, avg_level)
    cut = torch.arange(12) < 5
    rows = torch.stack([whole & cut, whole & ~cut], 1).flatten(0, 1)
    samples = torch.arange(5).repeat_interleave(2)
    found = token_weights(rows, correct.repeat_interleave(2), avg_level, samples)
    assert torch.equal(found.view(5, 2, 12).sum(1), expected)


def test_no_correct_row():
    weights = token_weights(MASK, torch.zeros(4, dtype=torch.bool), "correct")
    assert torch.equal(weights, torch.zeros(4, 4))


@pytest.mark.parametrize("avg_level", AVG_LEVELS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0)])
def test_nothing_to_weigh(avg_level, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    weights = token_weights(mask, torch.ones(shape[0], dtype=torch.bool), avg_level)
    assert torch.equal(weights, torch.zeros(shape))


@pytest.mark.parametrize(
    "avg_level, total", [("token", 1.0), ("sequence", 3 / 4), ("correct", 1.0)]
)
def test_weights_sum_to_the_share_of_rows_that_count(avg_level, total):
    weights = token_weights(MASK, torch.tensor([1, 0, 1, 0]).bool(), avg_level)
    assert weights.dtype == torch.float32
    assert weights.sum().item() == pytest.approx(total)


@pytest.mark.parametrize("avg_level", AVG_LEVELS)
def test_pieces_sum_to_the_whole(avg_level):
    generator = torch.Generator().manual_seed(0)
    B, T = 23, 17
    mask = torch.rand(B, T, generator=generator) < torch.rand(B, 1, generator=generator)
    correct = torch.rand(B, generator=generator) < 0.4
    losses = torch.randn(B, T, generator=generator, dtype=torch.float64)
    weights = token_weights(mask, correct, avg_level, dtype=torch.float64)
    whole = weighted_sum(losses, weights)

    pieces = torch.randperm(B, generator=generator).split([1, 5, 0, 9, 8])
    total = sum(weighted_sum(losses[rows], weights[rows]) for rows in pieces)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    flat = sum(weighted_sum(losses[r][mask[r]], weights[r][mask[r]]) for r in pieces)
    torch.testing.assert_close(flat, whole, rtol=1e-12, atol=1e-12)

    # and the whole is the formula
    n = mask.sum(-1)
    means = [(losses[b] * mask[b]).sum() / n[b] if n[b] else torch.tensor(0.0) for b in range(B)]
    expected = {
        "token": (losses * mask).sum() / mask.sum(),
        "sequence": sum(means) / B,
        "correct": sum(m for m, c in zip(means, correct, strict=True) if c) / correct.sum(),
    }[avg_level]
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-10)


def test_takes_the_enum_of_the_schema():
    class Level(StrEnum):
        token = "token"

    assert torch.equal(
        token_weights(MASK, torch.ones(4).bool(), Level.token),
        token_weights(MASK, torch.ones(4).bool(), "token"),
    )


def test_an_infinite_loss_of_weight_zero_counts_as_zero():
    values = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    total = weighted_sum(values, torch.tensor([2.0, 0.0, 0.0]))
    total.backward()
    assert total.item() == 2 and values.grad.tolist() == [2, 0, 0]


def test_sequence_sum():
    """The KL of VinePPO: a mean over samples of the sums over their tokens."""
    weights = token_weights(MASK, torch.zeros(4).bool(), "sequence_sum")
    assert weighted_sum(LOSSES, weights).item() == pytest.approx((6 + 5 + 15 + 0) / 4)
    of_three = token_weights(MASK, torch.zeros(4).bool(), "sequence_sum", SAMPLES)
    assert weighted_sum(LOSSES, of_three).item() == pytest.approx((6 + 5 + 15 + 0) / 3)
