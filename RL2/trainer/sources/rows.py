"""Rows of a data set as they are."""

import inspect
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets import Items, SFTDataset, collate, held_out, make_loader
from RL2.datasets.base import option
from RL2.datasets.end_of_turn import EndTokens
from RL2.distributed import rank
from RL2.distributed.comm import Batch
from RL2.runtime.errors import ConfigError, RL2Error, TrainingError, raised
from RL2.trainer.sources.source import Result, Source
from RL2.trainer.sources.stream import PromptStream

_ALWAYS = (
    "states", "actions", "action_mask", "lengths", "sample_ids", "group_ids", "correct",
)  # fmt: skip


def _misshapen(batch: Batch) -> str | None:
    """What is wrong with the first field that has neither one value a row nor one a token."""
    n_rows, n_tokens = batch["action_mask"].shape
    for name, value in batch.items():
        if value.shape not in ((n_rows,), (n_rows, n_tokens)):
            return (
                f"{name} of a batch has the shape {list(value.shape)}, expected [{n_rows}] or "
                f"[{n_rows}, {n_tokens}], rows and tokens of action_mask"
            )
    return None


class RowSource(Source):
    """Rows of `data`, every response token an action of advantage 1.

    The last step of an epoch takes the rows that are left. The actor's loss is evaluated on those
    that `data.test_ratio` holds out, or on those of `data.test_path`. A derived class may `read`
    another kind of data set, and make a `batch` of its items in its own way.
    """

    groups = ("data",)
    repeats = True
    unit = "rows"  # what data.batch_size counts

    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens):
        self.name = config.trainer.source
        self.test_freq = option(config.trainer, "test_freq")
        self.data = self._read(config.data, tokenizer, ends)
        self.datasets, self.end_ids = {"data": self.data}, self.data.end_ids
        self.test: Dataset | None = None
        if option(config.data, "test_path") is not None:
            self.test = self._read_test(config.data, tokenizer, ends)
            self.datasets["data.test_path"] = self.test
        elif ratio := option(config.data, "test_ratio", 0):
            self.data, self.test = held_out(self.data, ratio, config.trainer.seed)
        self.rows = {"training rows": len(self.data)}
        if self.test is not None:
            self.rows["test rows"] = len(self.test)
        self.per_step = f"{config.data.batch_size} {self.unit} each"
        loader = make_loader(
            self.data, config.data.batch_size, seed=config.trainer.seed, drop_last=False
        )
        self.steps_per_epoch = len(loader)
        self.stream = PromptStream(self.data, loader)
        wanted = {*_ALWAYS, *self.brings(config)}
        first = self.batch([self.data[0]])
        if missing := sorted(wanted - first.keys()):
            raise ConfigError(
                f"trainer.source={self.name}: its batches have no {', '.join(missing)}"
            )
        if wrong := _misshapen(first):
            raise ConfigError(f"trainer.source={self.name}: {wrong}")

    @classmethod
    def brings(cls, config: DictConfig) -> tuple[str, ...]:
        return ("advantages", "correct")

    def _read(
        self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
    ) -> Dataset:
        items = self.read(config, tokenizer, ends)
        if not isinstance(items, (list, Dataset)):
            raise ConfigError(
                f"trainer.source={self.name}: read returned a {type(items).__name__}; return a list"
            )
        return Items(items) if isinstance(items, list) else items

    def _read_test(
        self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
    ) -> Dataset:
        """The rows of `data.test_path`; `read` takes the path of a config."""
        instead = OmegaConf.merge(config, {"path": config.test_path})
        try:
            return self._read(instead, tokenizer, ends)
        except RL2Error as error:
            raise type(error)(str(error).replace("data.path", "data.test_path", 1)) from error

    def read(
        self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
    ) -> Dataset | list[Any]:
        """The items of what `data` (`config`) names; a list must hold JSON values."""
        return SFTDataset(config, tokenizer, key="data", ends=ends)

    def batch(self, items: list[Any]) -> Batch:
        """The batch of some items, each a sequence, or a list of those that are one sample."""
        samples = [item if isinstance(item, list) else [item] for item in items]
        batch = collate([sequence for sample in samples for sequence in sample])
        ids = torch.arange(len(items)).repeat_interleave(torch.tensor([*map(len, samples)]))
        ones = torch.ones(len(ids), dtype=torch.bool)
        advantages = batch["action_mask"].float()
        more = {"sample_ids": ids, "group_ids": ids, "advantages": advantages, "correct": ones}
        return batch | more

    def collect(self, step: int, last: bool) -> Result:
        items = self.stream.draw_batch()
        if rank() != 0:
            return None, {}
        batch = self._checked_batch(items)
        n_actions = batch["action_mask"].sum().item()
        n_samples = len(batch["sample_ids"].unique())
        return batch, {"train/avg_response_length": n_actions / n_samples}

    def _checked_batch(self, items: list[Any]) -> Batch:
        try:
            batch = self.batch(items)
        except RL2Error:
            raise
        except Exception as error:  # user code may raise anything
            what = raised(error, inspect.getfile(type(self)))
            raise TrainingError(f"trainer.source={self.name}: batch {what}") from error
        if wrong := _misshapen(batch):
            raise TrainingError(f"trainer.source={self.name}: {wrong}")
        return batch

    def evaluates(self, step: int) -> bool:
        frequency = self.test_freq
        return self.test is not None and frequency is not None and step % frequency == 0

    def test_batch(self) -> Batch | None:
        if self.test is None or rank() != 0:
            return None
        return self._checked_batch([self.test[i] for i in range(len(self.test))])

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict() if rank() == 0 else {}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.stream.load_state_dict(states[0])
