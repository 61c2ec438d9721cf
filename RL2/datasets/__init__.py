"""Data sets: rows from files or the hub, tokenised once, and loaders that resume exactly."""

from RL2.datasets.base import StatefulBatchSampler, collate, make_loader
from RL2.datasets.items import Items
from RL2.datasets.labels import LabelDataset
from RL2.datasets.pairs import PairDataset
from RL2.datasets.parts import held_out
from RL2.datasets.readers import load_rows
from RL2.datasets.rl import RLDataset
from RL2.datasets.rows import Rows
from RL2.datasets.sft import SFTDataset

__all__ = [
    "Items",
    "LabelDataset",
    "PairDataset",
    "RLDataset",
    "Rows",
    "SFTDataset",
    "StatefulBatchSampler",
    "collate",
    "held_out",
    "load_rows",
    "make_loader",
]
