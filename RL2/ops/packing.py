"""Which rows share a micro-batch."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def plan_packs(lengths: Sequence[int], max_length: int, multiple_of: int = 1) -> list[list[int]]:
    """Distribute rows over bins of at most `max_length` tokens, as evenly as possible.

    Args:
        lengths: tokens of each row, >= 0.
        max_length: tokens that a bin may hold.
        multiple_of: the number of bins is a multiple of it (the data-parallel size, so that
            every rank runs equally many micro-batches); bins may be empty.

    Returns:
        For each bin its row indices in ascending order; every row lies in exactly one bin. Bins
        come in descending order of tokens, so that `multiple_of` neighbours, which different
        ranks run at the same time, are of about one size. No rows: no bins. The same lengths
        always give the same plan.

    The number of bins is what best-fit decreasing needs (at most 11/9 of the optimum, in
    practice the optimum), rounded up. Over that many bins rows are spread by LPT (longest row
    to the least loaded bin) and by MULTIFIT (the smallest capacity at which best-fit
    decreasing still gets by with that many bins: Coffman, Garey and Johnson 1978); the plan
    with the smaller largest bin is taken.

    Raises:
        ValueError: a row that is longer than `max_length` (named by its index), a negative
            length, `multiple_of` < 1.
    """
    lengths = [int(length) for length in lengths]
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of}: must be at least 1")
    for row, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"row {row} has a negative length: {length}")
        if length > max_length:
            raise ValueError(f"row {row} has {length} tokens, more than max_length={max_length}")
    if not lengths:
        return []

    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    tightest = _best_fit(lengths, longest_first, max_length)
    n_bins = -(-len(tightest) // multiple_of) * multiple_of
    plans = [
        _least_loaded(lengths, longest_first, n_bins),
        _multifit(lengths, longest_first, n_bins, max_length),
    ]
    bins = min(plans, key=lambda plan: max(_loads(lengths, plan)))
    bins += [[] for _ in range(n_bins - len(bins))]
    return sorted(map(sorted, bins), key=lambda rows: (-sum(lengths[row] for row in rows), rows))


def _loads(lengths: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(lengths[row] for row in rows) for rows in bins]


def _least_loaded(lengths: list[int], order: list[int], n_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    heap = [(0, index) for index in range(n_bins)]
    for row in order:
        load, index = heap[0]
        bins[index].append(row)
        heapq.heapreplace(heap, (load + lengths[row], index))
    return bins


def _best_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each row into the fullest bin that still takes it, or a new one."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    for row in order:
        position = bisect_left(free, (lengths[row], -1))
        if position < len(free):
            room, index = free.pop(position)
        else:
            room, index = capacity, len(bins)
            bins.append([])
        bins[index].append(row)
        insort(free, (room - lengths[row], index))
    return bins


def _multifit(
    lengths: list[int], order: list[int], n_bins: int, max_length: int
) -> list[list[int]]:
    low = max(-(-sum(lengths) // n_bins), max(lengths))
    high = max_length
    best = _best_fit(lengths, order, high)
    while low < high:
        middle = (low + high) // 2
        bins = _best_fit(lengths, order, middle)
        if len(bins) <= n_bins:
            best, high = bins, middle
        else:
            low = middle + 1
    return best
