"""A data set in two parts: rows to train on, and rows held out to evaluate."""

from __future__ import annotations

import random
from hashlib import sha256
from typing import Any

from torch.utils.data import Dataset

from RL2.runtime.errors import DataError


class Part(Dataset):
    """Some items of a data set, in its order."""

    def __init__(self, dataset: Dataset, indices: list[int]):
        self.dataset, self.indices = dataset, indices
        self.key, self.batch_size_key = dataset.key, dataset.batch_size_key
        self.end_ids = dataset.end_ids
        self.fingerprint = sha256(f"{dataset.fingerprint} {indices}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def held_out(dataset: Dataset, ratio: float, seed: int) -> tuple[Part, Part]:
    """The items to train on, and a share of `ratio` of all, rounded, to evaluate. Which ones
    depends on the seed and the number of items alone.

    Raises:
        DataError: no item is left for one of the two.
    """
    n = len(dataset)
    n_test = round(ratio * n)
    if not 0 < n_test < n:
        what, way_out = ("evaluate", "raise") if n_test == 0 else ("train on", "lower")
        raise DataError(
            f"{dataset.key}.test_ratio={ratio}: leaves no row to {what}, as {dataset.key}.path has "
            f"{n}; {way_out} it, give more rows, or name others in {dataset.key}.test_path"
        )
    order = list(range(n))
    random.Random(f"{seed}/held out").shuffle(order)
    return Part(dataset, sorted(order[n_test:])), Part(dataset, sorted(order[:n_test]))
