"""A data set of items that are tokenised already."""

import json
from collections.abc import Collection
from hashlib import sha256
from typing import Any

from torch.utils.data import Dataset

from RL2.runtime.errors import DataError


class Items(Dataset):
    """Items in a list, with what a loader and a checkpoint ask of a data set.

    Args:
        items: as JSON has them, such as the `Sequence` of `RL2.datasets.base`, or lists of those.
        key: the config's node that names them.
        end_ids: the tokens that end what is learned.
    """

    def __init__(self, items: list[Any], key: str = "data", end_ids: Collection[int] = ()):
        if not items:
            raise DataError(f"{key}.path: no items; name a data set that has some")
        self.items, self.end_ids = items, end_ids
        self.key, self.batch_size_key = key, f"{key}.batch_size"
        self.fingerprint = sha256(json.dumps(items).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]
