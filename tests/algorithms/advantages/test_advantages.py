import math

import pytest
import torch

from RL2.algorithms import sample_returns
from RL2.algorithms.advantages import reinforce, spo
from RL2.algorithms.rewards import in_float32

LARGEST = torch.finfo(torch.float32).max


def rows(returns, sample_ids=None, group_ids=None, T=3):
    """A batch whose rows have their return on token 1 and action tokens 0 and 1."""
    B = len(returns)
    rewards = torch.zeros(B, T)
    rewards[:, 1] = torch.tensor(returns)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, :2] = True
    samples = torch.arange(B) if sample_ids is None else torch.tensor(sample_ids)
    groups = samples if group_ids is None else torch.tensor(group_ids)
    return rewards, mask, samples, groups


def per_row(advantages):
    """The advantage of each row; the same on both action tokens, 0 on the third."""
    assert torch.equal(advantages[:, 0], advantages[:, 1]) and not advantages[:, 2].any()
    return advantages[:, 0].tolist()


def test_sample_returns_sum_over_rows_and_tokens():
    rewards = torch.tensor([[1.0, 0.5], [0.0, 2.0], [4.0, 0.0], [0.0, 0.25]])
    ids = torch.tensor([7, 3, 7, -1])
    assert sample_returns(rewards, ids).tolist() == [5.5, 2.0, 5.5, 0.25]
    assert sample_returns(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_spo_is_the_return_itself():
    assert per_row(spo(*rows([1.0, 0.0, -2.0]))) == [1, 0, -2]
    multi_turn = rows([0.0, 1.0, 0.5], sample_ids=[4, 4, 9], group_ids=[0, 0, 0])
    assert per_row(spo(*multi_turn)) == [1, 1, 0.5]


def test_reinforce_subtracts_the_mean_of_the_group():
    batch = rows([1.0, 0.0, 1.0, 1.0, 2.0, 0.0], group_ids=[0, 5, 0, 5, 5, 5])
    assert per_row(reinforce(*batch)) == [0, -0.75, 0, 0.25, 1.25, -0.75]


def test_baseline_is_over_samples_not_rows():
    # sample 0 has three rows and return 1; sample 1 has one row and return 0
    batch = rows([0.0, 0.0, 1.0, 0.0], sample_ids=[0, 0, 0, 1], group_ids=[2, 2, 2, 2])
    assert per_row(reinforce(*batch)) == [0.5, 0.5, 0.5, -0.5]


@pytest.mark.parametrize("permutation", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]])
def test_order_of_rows_does_not_matter(permutation):
    batch = rows([1.0, 0.0, 3.0, 1.0, 1.0], sample_ids=[8, 8, 2, 5, 6], group_ids=[1, 1, 1, 0, 0])
    expected = torch.tensor(per_row(reinforce(*batch)))
    assert expected.tolist() == [-1, -1, 1, 0, 0]
    shuffled = reinforce(*(tensor[permutation] for tensor in batch))
    assert per_row(shuffled) == expected[permutation].tolist()


def test_baseline_of_the_batch():
    one_each = rows([1.0, 0.0, 2.0])
    assert per_row(reinforce(*one_each)) == [0, -1, 1]
    grouped = rows([1.0, 0.0, 2.0, 1.0], group_ids=[0, 0, 1, 1])
    assert per_row(reinforce(*grouped, global_norm=True)) == [0, -1, 1, 0]
    # multi-row samples of one-sample groups: still one sample each
    multi = rows([1.0, 1.0, 0.0], sample_ids=[0, 0, 1])
    assert per_row(reinforce(*multi)) == [1, 1, -1]


def test_group_that_lost_its_other_samples_has_no_advantage():
    batch = rows([1.0, 1.0, 0.0], group_ids=[0, 1, 1])
    for norm_var in (False, True):
        advantages = per_row(reinforce(*batch, norm_var=norm_var))
        assert advantages[0] == 0 and advantages[1] == -advantages[2] > 0


def test_norm_var_divides_by_the_unbiased_deviation():
    batch = rows([1.0, 0.0, 0.0, 1.0, 5.0, 1.0], group_ids=[0, 0, 0, 0, 1, 1])
    found = torch.tensor(per_row(reinforce(*batch, norm_var=True)))
    returns = batch[0].sum(-1).double()
    expected = torch.cat([(g - g.mean()) / g.std() for g in (returns[:4], returns[4:])])
    torch.testing.assert_close(found, expected.float())
    found = torch.tensor(per_row(reinforce(*batch, norm_var=True, global_norm=True)))
    expected = (returns - returns.mean()) / returns.std()
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(reward):
    batch = rows([reward] * 7, group_ids=[0, 0, 0, 1, 1, 1, 1])
    for options in ({}, {"norm_var": True}, {"norm_var": True, "global_norm": True}):
        assert per_row(reinforce(*batch, **options)) == [0] * 7


# Equal on paper, not in binary; the second of each pair is one reward.
EQUAL = [([0.1, 0.2], 0.3), ([1.1, 2.2], 3.3), ([0.1] * 10, 1.0), ([1.1, 2.2, -3.0], 0.3),
         ([0.1, 0.2, -0.3], 0.0), ([1e6, 0.1, 0.2], 1e6 + 0.3), ([-0.7, -0.1], -0.8)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("parts", "whole"), EQUAL)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_rewards_that_are_equal_on_paper_give_exactly_zero(parts, whole, scale, dtype):
    rewards = torch.zeros(3, 10, dtype=dtype)
    rewards[0, : len(parts)] = scale * torch.tensor(parts, dtype=dtype)
    rewards[1:, 4] = scale * torch.tensor(whole, dtype=dtype)
    mask, samples = torch.ones(3, 10, dtype=torch.bool), torch.arange(3)
    for groups in (torch.zeros_like(samples), samples):
        for options in ({}, {"norm_var": True}, {"norm_var": True, "global_norm": True}):
            assert not reinforce(rewards, mask, samples, groups, **options).any()
    if whole == 0:
        assert not spo(rewards, mask, samples, samples).any()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 1.0, 1e4])
def test_a_difference_that_is_one_is_normalised_whatever_its_size(scale, shift):
    returns = scale * (torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64) + shift)
    mask, samples = torch.ones(4, 1, dtype=torch.bool), torch.arange(4)
    found = reinforce(returns[:, None], mask, samples, samples // 4, norm_var=True)[:, 0]
    half = 0.75**0.5
    expected = torch.tensor([-half, half, -half, half], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("returns", "plain", "normed"),
    [
        # What is 0 in float32 is 0: its square is in float64, too.
        ([1e-200, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4),
        ([1e-320, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4),
        # Squares and differences that float32 does not reach.
        ([3e38, -3e38, 0.0, 0.0], [3e38, -3e38, 0.0, 0.0], [1.5**0.5, -(1.5**0.5), 0.0, 0.0]),
        ([3e38, -3e38, -3e38, -3e38], [LARGEST, *[-1.5e38] * 3], [1.5, -0.5, -0.5, -0.5]),
    ],
)
def test_rewards_at_the_ends_of_float32(returns, plain, normed):
    rewards = torch.tensor(returns, dtype=torch.float64)[:, None]
    mask, samples = torch.ones(4, 1, dtype=torch.bool), torch.arange(4)
    for norm_var, expected in ((False, plain), (True, normed)):
        found = reinforce(rewards, mask, samples, 0 * samples, norm_var=norm_var)
        torch.testing.assert_close(in_float32(found)[:, 0], torch.tensor(expected))


def test_what_is_not_finite_stays_so_in_float32():
    values = [math.inf, -math.inf, math.nan, -1e300]
    found = in_float32(torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([*values[:3], -LARGEST]), equal_nan=True)


def test_one_sample_and_no_sample():
    assert per_row(reinforce(*rows([2.0]), norm_var=True)) == [0]
    empty = (torch.zeros(0, 3), torch.zeros(0, 3).bool(), *torch.zeros(2, 0, dtype=torch.long))
    assert reinforce(*empty, norm_var=True).shape == (0, 3) == spo(*empty).shape


def test_dtype_is_kept():
    for dtype in (torch.float32, torch.float64):
        rewards, *rest = rows([1.0, 0.0], group_ids=[0, 0])
        for estimator in (reinforce, spo):
            assert estimator(rewards.to(dtype), *rest).dtype == dtype
