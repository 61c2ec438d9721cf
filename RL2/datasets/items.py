"""A data set of items that are tokenised already."""

import json
from collections.abc import Collection
from hashlib import sha256
from typing import Any

from torch.utils.data import Dataset

from RL2.runtime.errors import DataError


class Items(Dataset):
    """Items in a list, as a data set for loaders and checkpoints.

    Args:
        items: JSON values, such as the `Sequence` of `RL2.datasets.base`, or lists of those.
        key: name of the config's node, for messages.
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
