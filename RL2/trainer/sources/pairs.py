"""Pairs of answers, of which one is preferred, and answers with a label."""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets import LabelDataset, PairDataset
from RL2.datasets.end_of_turn import EndTokens
from RL2.distributed.comm import Batch
from RL2.trainer.sources.rows import RowSource


class PairSource(RowSource):
    """Pairs of answers of `data`, two rows of a batch each, the chosen one first.

    Its batches have `pair_ids`, `chosen` and `labels [B, T]`, 1 for chosen and -1 for rejected
    answers.
    """

    unit = "pairs"

    @classmethod
    def brings(cls, config: DictConfig) -> tuple[str, ...]:
        return (*super().brings(config), "pair_ids", "chosen", "labels")

    def read(
        self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
    ) -> Dataset | list[Any]:
        return PairDataset(config, tokenizer, key="data", ends=ends)

    def largest(self) -> Iterator[Batch]:
        for pairs in self.datasets.values():
            sizes = [sum(len(one["token_ids"]) for one in pair.values()) for pair in pairs]
            yield self.batch([pairs[sizes.index(max(sizes))]])

    def batch(self, items: list[Any]) -> Batch:
        batch = super().batch([item[side] for item in items for side in ("chosen", "rejected")])
        pairs = torch.arange(len(items)).repeat_interleave(2)
        chosen = torch.tensor([True, False]).repeat(len(items))
        labels = torch.where(chosen, 1.0, -1.0)[:, None] * batch["action_mask"]
        return batch | {
            "pair_ids": pairs, "chosen": chosen, "labels": labels, "group_ids": pairs,
        }  # fmt: skip


class ScoredPairSource(PairSource):
    """The same for reward models, which learn at one token behind the end of each row."""

    def read(
        self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
    ) -> Dataset | list[Any]:
        return PairDataset(config, tokenizer, key="data", ends=ends, scored=True)


class LabelSource(RowSource):
    """Answers of `data`, each with a label.

    Its batches have `labels [B, T]`, 1 for desired and -1 for undesired answers.
    """

    @classmethod
    def brings(cls, config: DictConfig) -> tuple[str, ...]:
        return (*super().brings(config), "labels")

    def read(
        self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
    ) -> Dataset | list[Any]:
        return LabelDataset(config, tokenizer, key="data", ends=ends)
