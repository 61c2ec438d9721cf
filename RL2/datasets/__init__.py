"""Data sets: rows from files or the hub, tokenised once, and loaders that resume exactly."""

from RL2.datasets.base import Rows, StatefulBatchSampler, collate, load_rows, make_loader
from RL2.datasets.items import Items
from RL2.datasets.rl import RLDataset
from RL2.datasets.sft import SFTDataset

__all__ = [
    "Items",
    "RLDataset",
    "Rows",
    "SFTDataset",
    "StatefulBatchSampler",
    "collate",
    "load_rows",
    "make_loader",
]
