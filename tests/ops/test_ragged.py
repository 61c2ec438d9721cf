import pytest
import torch

from RL2.ops.ragged import ranges


@pytest.mark.parametrize(
    "pairs",
    [
        [(3, 2), (10, 4), (0, 1)],
        [(5, 0), (7, 3), (2, 0), (2, 0), (9, 1), (1, 0)],
        [(4, 0)],
        [],
    ],
)
def test_ranges(pairs):
    starts, lengths = (torch.tensor([pair[i] for pair in pairs]).long() for i in (0, 1))
    found = ranges(starts, lengths)
    assert found.dtype == torch.int64
    assert found.tolist() == [start + i for start, length in pairs for i in range(length)]
