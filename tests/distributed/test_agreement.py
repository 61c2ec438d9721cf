"""All ranks go on, or none, and all know why; names that ranks agree on before they sum what stands
behind them."""

import socket

import pytest

from RL2.distributed import rank
from RL2.distributed.agreement import all_names, all_or_none, check_same
from RL2.distributed.same_start import Fact
from RL2.runtime.errors import ConfigError, DataError, TrainingError
from tests.ranks import run_on_ranks

CASES = [
    ([["b", "a"], ["a", "b"]], ["a", "b"]),
    ([["b", "a"], ["a", "c"]], ["a", "b", "c"]),
    ([[], ["a"]], ["a"]),
    ([["ab", "c"], ["a", "bc"]], ["a", "ab", "bc", "c"]),  # the same letters
    ([["\udcff"], ["ü"]], ["ü", "\udcff"]),
    ([[], []], []),
]


def agreed(cases):
    return [all_names(names[rank()]) for names, _ in cases]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_every_rank_has_the_names_of_all(n_ranks):
    expected = [sorted(names[0]) if n_ranks == 1 else all_ for names, all_ in CASES]
    assert run_on_ranks(n_ranks, agreed, CASES) == [expected] * n_ranks


def _read(bad: int | None):
    def action():
        if rank() == bad:
            raise DataError("row 3")
        return rank()

    try:
        return all_or_none(action)
    except (DataError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"


def test_one_rank_fails():
    assert run_on_ranks(2, _read, None) == [0, 1]
    other = "TrainingError: not started, as another rank ends: rank 1 on "
    assert run_on_ranks(2, _read, 1) == [f"{other}{socket.gethostname()}: DataError: row 3",
                                         "DataError: row 3"]  # fmt: skip


def _compare(*values):
    try:
        check_same({"rows": Fact(values[rank()], "give all the same")})
    except ConfigError as error:
        return str(error)


def test_ranks_with_other_facts():
    host = socket.gethostname()
    assert run_on_ranks(2, _compare, "a", "a") == [None, None]
    line = f"rows: rank 0 on {host} has a, rank 1 on {host} has b; give all the same"
    assert run_on_ranks(2, _compare, "a", "b") == [line, line]


def test_a_single_rank_needs_no_group():
    assert all_or_none(lambda: 3) == 3
    with pytest.raises(DataError):
        all_or_none(lambda: (_ for _ in ()).throw(DataError("row 3")))
