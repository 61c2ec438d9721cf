"""Which rows share a micro-batch."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

Bins = list[list[int]]


def plan_packs(
    lengths: Sequence[int],
    max_length: int,
    multiple_of: int = 1,
    quadratic: float = 0.0,
    units: Sequence[int] | None = None,
) -> Bins:
    """Distribute rows over bins of at most `max_length` tokens, at costs as even as possible.

    A row of l tokens costs l + quadratic * l**2, for attention and for the rest of the model, which
    is linear in the tokens. A bin costs the sum of its rows.

    Args:
        lengths: number of tokens of each row, >= 0.
        max_length: maximum number of tokens of a bin.
        multiple_of: the number of bins is a multiple of it (the data-parallel size, so that
            every rank runs equally many micro-batches); bins may be empty.
        quadratic: cost of attention per token pair, as a multiple of the cost of one token in
            the rest of the model.
        units: a number for each row; rows with the same number share a bin. None: each row on its
            own.

    Returns:
        For each bin its row indices in ascending order; every row is in exactly one bin. Bin b is
        the (b // multiple_of)-th micro-batch of place b % multiple_of. Bins of the same turn have
        about the same cost, as all places wait for the slowest, and more expensive turns come
        first; within a turn the places with the least work so far get the most expensive bins. No
        rows: no bins. The same lengths always give the same plan.

    The number of bins is what best-fit decreasing needs (at most 11/9 of the optimum, in
    practice the optimum), rounded up. Rows are spread over these bins by LPT (most expensive row to
    the cheapest bin with room), by Karmarkar and Karp's differencing (1982), which is best for
    few bins of many rows, and by MULTIFIT on tokens (the smallest capacity at which best-fit
    decreasing still needs no more bins: Coffman, Garey and Johnson 1978), which is best for many
    bins of few rows. A single row that costs more than an even share decides how long its turn
    takes. So a second plan first fills the other bins of such turns up to that cost, which makes
    the turns after them shorter. The plan whose most expensive bin is cheapest is used; among
    equals, the one whose turns take the least time in total.

    Raises:
        ValueError: a row (named by its index) or unit that is longer than `max_length`, a negative
            length, `multiple_of` < 1, `quadratic` < 0.
    """
    lengths = [int(length) for length in lengths]
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of}: must be at least 1")
    if not quadratic >= 0:
        raise ValueError(f"quadratic={quadratic}: must be at least 0")
    for row, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"row {row} has a negative length: {length}")
        if length > max_length:
            raise ValueError(f"row {row} has {length} tokens, more than max_length={max_length}")
    if not lengths:
        return []

    costs = [length + quadratic * length**2 for length in lengths]
    if units is None:
        return _plan(_Task(lengths, costs, max_length, multiple_of))
    members: dict[int, list[int]] = {}
    for row, unit in enumerate(units):
        members.setdefault(int(unit), []).append(row)
    whole = [*members.values()]
    sizes = _sums(lengths, whole)
    for unit, size in zip(members, sizes, strict=True):
        if size > max_length:
            raise ValueError(f"unit {unit} has {size} tokens, more than max_length={max_length}")
    plan = _plan(_Task(sizes, _sums(costs, whole), max_length, multiple_of))
    return [sorted(row for unit in bin_ for row in whole[unit]) for bin_ in plan]


class _Task(NamedTuple):
    """Tokens and cost of every row, maximum tokens of a bin, bins of a turn."""

    lengths: list[int]
    costs: list[float]
    max_length: int
    n_places: int


def _plan(task: _Task) -> Bins:
    lengths, costs, max_length, n_places = task
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    n_turns = -(-len(_best_fit(lengths, order, max_length)) // n_places)
    plans = [_spread(task, order, n_turns), _paced(task, order, n_turns)]
    return _in_places(costs, min(plans, key=lambda turns: _waits(costs, turns)))


def _paced(task: _Task, order: list[int], n_turns: int) -> list[Bins]:
    """Turns as long as the most expensive row left, while that is more than an even share of all
    rows left; then even ones."""
    lengths, costs, max_length, n_places = task
    turns: list[Bins] = []
    for n_left in range(n_turns, 1, -1):
        if costs[order[0]] * n_left * n_places <= sum(costs[row] for row in order):
            break
        bins, rest = _fill(lengths, costs, order, max_length, n_places)
        if not rest or len(_best_fit(lengths, rest, max_length)) > (n_left - 1) * n_places:
            break
        turns += _in_turns(costs, bins, 1, n_places)
        order = rest
    turns += _spread(task, order, n_turns - len(turns))
    return sorted(turns, key=lambda bins: -max(_sums(costs, bins)))


def _spread(task: _Task, order: list[int], n_turns: int) -> list[Bins]:
    """Rows over the bins of `n_turns` turns, all of about the same cost."""
    lengths, costs, max_length, n_places = task
    n_bins = n_turns * n_places
    plans = [
        _least_loaded(lengths, costs, order, n_bins, max_length),
        _largest_differencing(costs, order, n_bins),
        _multifit(lengths, order, n_bins, max_length),
    ]
    turns = [
        _in_turns(costs, plan, n_turns, n_places)
        for plan in plans
        if max(_sums(lengths, plan)) <= max_length
    ]
    return min(turns, key=lambda plan: _waits(costs, plan))


def _sums(values: Sequence[float], bins: Bins) -> list[float]:
    return [sum(values[row] for row in rows) for rows in bins]


def _in_turns(costs: list[float], bins: Bins, n_turns: int, n_places: int) -> list[Bins]:
    """Bins, the most expensive first, as many as there are turns and places."""
    bins = list(map(sorted, bins)) + [[] for _ in range(n_turns * n_places - len(bins))]
    bins.sort(key=lambda rows: (-sum(costs[row] for row in rows), rows))
    return [bins[start : start + n_places] for start in range(0, len(bins), n_places)]


def _waits(costs: list[float], turns: list[Bins]) -> tuple[float, float]:
    """Cost of the most expensive bin, and the sum of that over all turns."""
    highest = [max(_sums(costs, bins)) for bins in turns]
    return max(highest), sum(highest)


def _in_places(costs: list[float], turns: list[Bins]) -> Bins:
    """All bins in the order of the result."""
    totals = [0.0] * len(turns[0])
    result = []
    for bins in turns:
        least_first = sorted(range(len(totals)), key=totals.__getitem__)
        placed: Bins = [[] for _ in bins]
        for place, rows in zip(least_first, bins, strict=True):
            placed[place] = rows
            totals[place] += sum(costs[row] for row in rows)
        result += placed
    return result


def _fill(
    lengths: list[int], costs: list[float], order: list[int], capacity: int, n_bins: int
) -> tuple[Bins, list[int]]:
    """Bins, filled up to the cost of the most expensive row by best-fit decreasing; rows left."""
    bins: Bins = [[] for _ in range(n_bins)]
    room = [capacity] * n_bins  # in tokens
    free = [(costs[order[0]], index) for index in range(n_bins)]  # (cost left, bin), ascending
    rest = []
    for row in order:
        fitting = range(bisect_left(free, (costs[row], -1)), n_bins)
        place = next((p for p in fitting if room[free[p][1]] >= lengths[row]), None)
        if place is None:
            rest.append(row)
            continue
        left, index = free.pop(place)
        bins[index].append(row)
        room[index] -= lengths[row]
        insort(free, (left - costs[row], index))
    return bins, rest


def _least_loaded(
    lengths: list[int], costs: list[float], order: list[int], n_bins: int, capacity: int
) -> Bins:
    """Each row into the cheapest bin that has room for it; beyond `capacity` if none has."""
    bins: Bins = [[] for _ in range(n_bins)]
    heap = [(0.0, index) for index in range(n_bins)]
    free = [capacity] * n_bins
    for row in order:
        full = []
        while free[heap[0][1]] < lengths[row] and len(heap) > 1:
            full.append(heapq.heappop(heap))
        load, index = heap[0]
        bins[index].append(row)
        free[index] -= lengths[row]
        heapq.heapreplace(heap, (load + costs[row], index))
        for bin_ in full:
            heapq.heappush(heap, bin_)
    return bins


def _largest_differencing(costs: list[float], order: list[int], n_bins: int) -> Bins:
    """Karmarkar-Karp: join the two partial plans of the largest spread, the most expensive bins of
    one with the cheapest of the other, until one plan is left."""
    # A plan: (-spread, when it was made, its bins that are not empty, most expensive first).
    heap = [(-costs[row], n, [(costs[row], [row])]) for n, row in enumerate(order)]
    heapq.heapify(heap)
    for n in range(len(order), 2 * len(order) - 1):
        (*_, first), (*_, second) = heapq.heappop(heap), heapq.heappop(heap)
        n_shared = max(0, len(first) + len(second) - n_bins)
        split_first, split_second = len(first) - n_shared, len(second) - n_shared
        joined = [
            (cost + other_cost, rows + other_rows)
            for (cost, rows), (other_cost, other_rows) in zip(
                first[split_first:], reversed(second[split_second:]), strict=True
            )
        ]
        joined += first[:split_first] + second[:split_second]
        joined.sort(key=lambda one: -one[0])
        cheapest = joined[-1][0] if len(joined) == n_bins else 0.0
        heapq.heappush(heap, (cheapest - joined[0][0], n, joined))
    return [rows for _, rows in heap[0][2]]


def _best_fit(lengths: list[int], order: list[int], capacity: int) -> Bins:
    """Each row into the fullest bin with room for it, or a new one."""
    bins: Bins = []
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


def _multifit(lengths: list[int], order: list[int], n_bins: int, max_length: int) -> Bins:
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
