"""Estimators of the shelf: numbers worked out by hand, a naive loop, and what all of them keep."""

import itertools
import math
import statistics

import pytest
import torch

from RL2.algorithms.advantages.attempts import maxrl, pass_k
from RL2.algorithms.advantages.baselines import opo, reinforce, remax, rloo
from RL2.algorithms.advantages.plus_plus import reinforce_pp, reinforce_pp_baseline
from RL2.algorithms.advantages.several import gdpo
from RL2.algorithms.estimator import resolve_advantage

OF_SAMPLES = {
    "rloo": rloo, "opo": opo, "reinforce_pp_baseline": reinforce_pp_baseline, "maxrl": maxrl,
    "pass_k": pass_k, "reinforce": reinforce,
}  # fmt: skip


def batch(samples, group_ids):
    """Each sample is a list of rows, each row a list of the rewards of its action tokens; a token
    of the prompt stands before a row, and one of padding behind it."""
    rows = [(i, row) for i, sample in enumerate(samples) for row in sample]
    T = max(len(row) for _, row in rows) + 2
    rewards, mask = torch.zeros(len(rows), T, dtype=torch.float64), torch.zeros(len(rows), T).bool()
    for b, (_, row) in enumerate(rows):
        rewards[b, 1 : 1 + len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[b, 1 : 1 + len(row)] = True
    ids = torch.tensor([i for i, _ in rows])
    return rewards, mask, 10 * ids + 3, torch.tensor(group_ids)[ids]


def of_samples(function, samples, group_ids, **options):
    """The advantage of each sample, which all of its action tokens have and no other."""
    values = batch(samples, group_ids)
    found = function(*values, **options)
    assert not found[~values[1]].any() and found.dtype == torch.float64
    result = []
    for i in range(len(samples)):
        own = found[values[2] == 10 * i + 3][values[1][values[2] == 10 * i + 3]]
        assert (own == own[0]).all()
        result.append(own[0].item())
    return result


def one_token(*returns):
    return [[[float(r)]] for r in returns]


# Two groups, of four and two samples; sample 1 has two rows and three action tokens.
SAMPLES = [
    [[0.0, 1.0]],
    [[0.0], [0.0, 0.0]],
    [[1.0]],
    [[0.0, 0.0, 0.0, 0.0]],
    [[2.0]],
    [[0.0, 0.0]],
]
GROUPS = [7, 7, 7, 7, 1, 1]


def test_rloo_by_hand():
    # 1 - 1/3, 0 - 2/3, twice; 2 - 0, 0 - 2
    found = of_samples(rloo, SAMPLES, GROUPS)
    assert found == pytest.approx([2 / 3, -2 / 3, 2 / 3, -2 / 3, 2, -2], rel=1e-15)


def test_opo_by_hand():
    # lengths 2 3 1 4: b = (2·1 + 1·1) / 10; lengths 1 2: b = 2/3
    found = of_samples(opo, SAMPLES, GROUPS)
    assert found == pytest.approx([0.7, -0.3, 0.7, -0.3, 4 / 3, -2 / 3], rel=1e-15)


def test_reinforce_pp_baseline_by_hand():
    # A' = ½ -½ ½ -½ 1 -1: the squares are 3, the unbiased variance 3/5
    found = of_samples(reinforce_pp_baseline, SAMPLES, GROUPS)
    std = 0.6**0.5
    assert found == pytest.approx([x / std for x in (0.5, -0.5, 0.5, -0.5, 1, -1)], rel=1e-12)


def test_maxrl_by_hand():
    found = of_samples(maxrl, SAMPLES + one_token(0, 0), [*GROUPS, 4, 4])
    assert found == [1, -1, 1, -1, 1, -1, 0, 0]  # means ½, 1 and 0
    # one of four is right: (1 - ¼) / ¼
    assert of_samples(maxrl, one_token(1, 0, 0, 0), [0] * 4) == [3, -1, -1, -1]
    assert of_samples(maxrl, one_token(-1, 1), [0, 0]) == [0, 0]
    with pytest.raises(ValueError, match="the mean reward of a group is -0.5, and maxrl divides"):
        of_samples(maxrl, one_token(-1, 0), [0, 0])


def test_pass_k_by_hand():
    # Two of four are right, k = 2: of a right one's three partners, two are wrong.
    assert of_samples(pass_k, one_token(1, 0, 0, 1), [0] * 4, k=2) == pytest.approx(
        [4 / 3, 0, 0, 4 / 3], rel=1e-15
    )
    # k = 3: one of its three pairs of partners is wrong.
    assert of_samples(pass_k, one_token(1, 0, 0, 1), [0] * 4, k=3) == pytest.approx([1, 0, 0, 1])
    # k = 4: with all others there is always another right one, unless it is the only one.
    assert of_samples(pass_k, one_token(1, 0, 0, 1), [0] * 4, k=4) == [0] * 4
    assert of_samples(pass_k, one_token(1, 0, 0, 0), [0] * 4, k=4) == [4, 0, 0, 0]
    # Rewards that are no 0 and 1, k = 2: 2·((3-1) + (3-0))/2, 2·(1-0)/2
    assert of_samples(pass_k, one_token(3, 1, 0), [0] * 3, k=2) == [5, 1, 0]
    # A group that lost samples.
    assert of_samples(pass_k, one_token(1, 0, 1, 0, 0), [0, 0, 1, 1, 1], k=3)[:2] == [0, 0]


def test_pass_k_is_the_gradient_of_pass_k():
    """Its mean over all outcomes of a Bernoulli policy is the derivative of 1 - (1 - p)^k."""
    n, p = 5, 0.3
    for k in (2, 3, 5):
        mean = 0.0
        for outcome in itertools.product((0.0, 1.0), repeat=n):
            found = of_samples(pass_k, one_token(*outcome), [0] * n, k=k)
            # d log P(outcome) / dp of each sample
            slopes = [1 / p if right else -1 / (1 - p) for right in outcome]
            chance = math.prod(p if right else 1 - p for right in outcome)
            mean += chance * sum(a * s for a, s in zip(found, slopes, strict=True)) / n
        assert mean == pytest.approx(k * (1 - p) ** (k - 1), rel=1e-12)


def test_remax_by_hand():
    rewards, mask, samples, _ = batch(SAMPLES, GROUPS)
    greedy = torch.where(mask, torch.tensor(0.1), torch.tensor(9.0))
    found = remax(rewards, mask, samples, greedy)
    assert found[0].tolist() == pytest.approx([0, 0.9, 0.9, 0, 0, 0])
    assert found[1].tolist()[:3] == pytest.approx([0, -0.1, 0]) == found[1].tolist()[:3]
    # equal on paper, though one is in float32
    rewards[rewards == 1] = 0.1
    assert remax(rewards, mask, samples, greedy)[0].tolist() == [0] * 6


def test_reinforce_pp_by_hand():
    # γ = ½, rewards 0 1 and 4 0 over two rows of a sample: returns ½ 1; 4 0, and 2·½ before
    rewards, mask, samples, _ = batch([[[0.0, 1.0]], [[0.0], [4.0, 0.0]]], [0, 1])
    returns = [0.5, 1.0, 2.0, 4.0, 0.0]
    mean, std = statistics.mean(returns), statistics.stdev(returns)
    found = reinforce_pp(rewards, mask, samples, gamma=0.5)
    assert found[mask].tolist() == pytest.approx([(x - mean) / std for x in returns], rel=1e-12)
    assert not found[~mask].any()
    assert not reinforce_pp(torch.ones(2, 1), torch.ones(2, 1).bool(), torch.arange(2)).any()


def test_gdpo_by_hand():
    """Two rewards of two groups of two; sample 1 has two rows and more tokens."""
    values = batch([[[0.0]], [[0.0], [0.0, 0.0]], [[0.0]], [[0.0]]], [0, 0, 1, 1])
    # accuracy 1 0 | 1 1, format 0 0.5 | 0 1: each normalised to ±1/√2, or 0 where it is equal
    parts = torch.tensor([[1, 0], [0, 0.5], [0, 0.5], [1, 0], [1, 1]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.5]], dtype=torch.float64).expand(5, 2)
    # with weights 1 and ½: (1 - ½)/√2, its opposite, then -½/√2 and its opposite: mean 0
    a = 0.5 / 2**0.5
    std = (4 * a * a / 3) ** 0.5
    found = gdpo(values[0], parts, weights, *values[1:])
    assert found[[0, 1, 2, 3, 4], 1].tolist() == pytest.approx([a / std, *[-a / std] * 3, a / std])
    assert not found[~values[1]].any() and found.dtype == torch.float64
    order = torch.tensor([4, 1, 0, 2, 3])
    again = [x[order] for x in (values[0], parts, weights, *values[1:])]
    torch.testing.assert_close(gdpo(*again), found[order], rtol=1e-12, atol=0)
    # one reward: GRPO, then over the batch
    one = gdpo(values[0], parts[:, :1], weights[:, :1], *values[1:])[:, 1]
    grpo = [1 / 2**0.5, -1 / 2**0.5, 0, 0]
    assert one[[0, 1, 3, 4]].tolist() == pytest.approx([x / statistics.stdev(grpo) for x in grpo])
    # equal on paper: exactly 0
    parts[:, 0], parts[:, 1] = torch.tensor([0.3, 0.1 + 0.2, 0.1 + 0.2, 0.3, 0.3]), 1.0
    assert not gdpo(values[0], parts, weights, *values[1:]).any()


def naive(name, returns, lengths, groups, k):
    """The formulas of the docstrings, sample by sample."""
    result = []
    for i, group in enumerate(groups):
        own = [j for j, other in enumerate(groups) if other == group]
        others = [returns[j] for j in own if j != i]
        mean = statistics.fmean(returns[j] for j in own)
        if not others:
            result.append(0.0)
        elif name == "rloo":
            result.append(returns[i] - statistics.fmean(others))
        elif name == "opo":
            total = sum(lengths[j] for j in own)
            result.append(returns[i] - sum(lengths[j] * returns[j] for j in own) / total)
        elif name == "maxrl":
            result.append((returns[i] - mean) / mean if mean else 0.0)
        elif name == "pass_k":
            sets = [*itertools.combinations(others, k - 1)]
            gains = [max(returns[i], *best) - max(best) for best in sets]
            result.append(k * statistics.fmean(gains) if gains else 0.0)
        else:
            result.append(returns[i] - mean)
    if name == "reinforce_pp_baseline":
        std = statistics.stdev(result)
        result = [x / std for x in result]
    return result


@pytest.mark.parametrize("name", OF_SAMPLES)
@pytest.mark.parametrize("seed", range(3))
def test_as_a_loop_over_samples_says_it(name, seed):
    """Groups of one to six samples in any order, of one to three rows each."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    groups = [g for g in (0, 1, 2, 3) for _ in range(number(1, 7))]
    groups = [groups[i] for i in torch.randperm(len(groups), generator=draw)]
    samples = [
        [[number(0, 5) / 4 for _ in range(number(1, 4))] for _ in range(number(1, 4))]
        for _ in groups
    ]
    returns = [sum(map(sum, sample)) for sample in samples]
    lengths = [sum(map(len, sample)) for sample in samples]
    options = {"k": 3} if name == "pass_k" else {}
    found = of_samples(OF_SAMPLES[name], samples, groups, **options)
    assert found == pytest.approx(naive(name, returns, lengths, groups, 3), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", [*OF_SAMPLES, "reinforce_pp"])
def test_what_all_of_them_keep(name):
    """The order of rows (those of a sample stay in order) changes nothing, rewards that are equal
    on paper give exactly 0, and so does a sample alone."""
    estimator = resolve_advantage({"estimator": name})
    inputs = ("rewards", "action_mask", "sample_ids", "group_ids")

    def call(values):
        return estimator(dict(zip(inputs, values, strict=True)))["advantages"]

    values = batch(SAMPLES, GROUPS)
    order = torch.tensor([6, 3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(
        call([x[order] for x in values]), call(values)[order], rtol=1e-12, atol=0
    )
    equal = batch(
        [[[0.1, 0.2]], [[0.3]], [[0.2], [0.1]], [[0.3, 0.0]], [[0.1, 0.1, 0.1]]], [0, 0, 0, 1, 1]
    )
    if name == "reinforce_pp":  # a value for each token, so equal from the first one on
        equal = batch(one_token(0.1 + 0.2, 0.3, 0.3), [0, 0, 1])
    assert not call(equal).any()
    assert not call(batch([[[0.7]]], [0])).any()
    assert call([x[:0] for x in values]).shape == (0, values[0].shape[1])
