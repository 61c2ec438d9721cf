"""Names that ranks agree on before they sum what stands behind them."""

import pytest

from RL2.distributed import rank
from RL2.distributed.agreement import all_names
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
