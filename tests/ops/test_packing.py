import random
import time

import pytest

from RL2.ops import plan_packs


def loads(lengths, bins):
    return [sum(lengths[row] for row in rows) for rows in bins]


def check(lengths, max_length, multiple_of):
    bins = plan_packs(lengths, max_length, multiple_of)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert len(bins) % multiple_of == 0
    tokens = loads(lengths, bins)
    assert max(tokens, default=0) <= max_length
    assert tokens == sorted(tokens, reverse=True)
    assert bins == plan_packs(list(lengths), max_length, multiple_of)
    return bins


def test_hand_made():
    assert plan_packs([4, 3, 3, 2], 6, 2) == [[0, 3], [1, 2]]
    assert plan_packs([5, 5], 10, 1) == [[0, 1]]
    assert plan_packs([5, 5, 1], 10, 1) == [[0, 2], [1]]


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 100])
def test_every_row_once_and_no_bin_too_full(n_rows, multiple_of):
    generator = random.Random(n_rows)
    for max_length in (64, 100, 1000):
        check([generator.randint(0, 64) for _ in range(n_rows)], max_length, multiple_of)


def test_fewer_rows_than_ranks_leave_bins_empty():
    assert plan_packs([3, 2], 10, 4) == [[0], [1], [], []]
    assert plan_packs([], 10, 4) == []


def test_spreads_over_all_ranks_rather_than_filling_one():
    assert plan_packs([1, 1, 1, 1], 100, 2) == [[0, 2], [1, 3]]


def test_tight_rows_fit_though_the_least_loaded_bin_would_overflow():
    # 7+3, 6+4, 5+5 exactly; longest to the least loaded gives 11 in one bin
    bins = check([3, 3, 2, 2, 2], 6, 2)
    assert loads([3, 3, 2, 2, 2], bins) == [6, 6]


def test_balanced_on_a_long_tail():
    generator = random.Random(0)
    lengths = [min(8000, int(generator.lognormvariate(6.5, 0.8))) + 100 for _ in range(512)]
    bins = check(lengths, 8192, 4)
    tokens = loads(lengths, bins)
    assert len(bins) <= -(-(sum(lengths) // 8192 + 1) // 4) * 4 + 4
    assert max(tokens) / (sum(tokens) / len(tokens)) < 1.05


def test_rows_of_over_half_a_bin_take_a_bin_each():
    assert len(check([6] * 50, 10, 1)) == 50


def test_fast_for_many_rows():
    generator = random.Random(1)
    for high in (600, 8192):
        lengths = [generator.randint(1, high) for _ in range(4096)]
        start = time.perf_counter()
        check(lengths, 8192, 8)
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([3, 12, 1], 10, 1), "row 1 has 12 tokens, more than max_length=10"),
        (([3, -1], 10, 1), "row 1 has a negative length: -1"),
        (([3], 10, 0), "multiple_of=0"),
    ],
)
def test_impossible(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(*arguments)
