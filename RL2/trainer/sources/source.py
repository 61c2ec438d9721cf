"""The interface of sources, which give each step its batch and may serve the weights after it."""

# ruff: noqa: B027  most sources do not need the empty methods

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets.end_of_turn import EndTokens
from RL2.distributed.comm import Batch
from RL2.workers import Actor

Result = tuple[Batch | None, dict[str, float]]


class Source(ABC):
    """Where batches come from. The loop uses only what is defined here.

    `trainer.source` names one: a key of `SOURCES`, or a class of your own that is derived from this
    one (`my_source.py:MySource`). Every rank makes it, before any model loads, with the run's
    config, the actor's tokenizer and its end tokens; there it reads its data and checks them.
    Without an engine it needs `collect`, its position (`state_dict`, `load_state_dict`),
    `steps_per_epoch` and `per_step`. For a data set of another kind it is shorter to derive from
    `RowSource`, which needs `read` and `batch`.

    Attributes:
        groups: the groups of the config that it reads.
        steps_per_epoch: how many steps `trainer.n_epochs` counts as one epoch.
        per_step: what one step takes, in words.
        datasets: the data sets that were read, by the config node whose `path` names them, or the
            key that does; each has a length and a `fingerprint`. A resumed run compares them.
        rows: the numbers of rows, by their purpose.
        repeats: whether the same rows come again in the next epoch.
        contexts: the prompts (token ids) that `teacher` reads in the place of those of the training
            rows, by the index of the row, which batches have as `prompt_index`; None: the same.
        end_ids: tokens at which its sequences end.
        ends: what happens there, in words.
    """

    groups: tuple[str, ...] = ()
    steps_per_epoch: int
    per_step: str
    datasets: Mapping[str, Dataset] = {}
    rows: Mapping[str, int] = {}
    repeats: bool = False
    contexts: Sequence[Sequence[int]] | None = None
    end_ids: Collection[int] = ()
    ends: str = "turns are learned to end"

    @abstractmethod
    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens):
        """Read the data; nothing here waits for other ranks."""

    @classmethod
    def brings(cls, config: DictConfig) -> tuple[str, ...]:
        """Fields of its batches that a loss or an estimator may name. With `advantages` among
        them, `adv` is not used. Every batch also has the fields of `RL2.datasets.collate` and
        `correct [B]`."""
        return ()

    def start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the engine, after the models. dtype: the dtype that the actor computes in."""

    @abstractmethod
    def collect(self, step: int, last: bool) -> Result:
        """The batch of a step and its metrics on rank 0, None and {} elsewhere (a collective); None
        on rank 0 as well if there is nothing to train on. last: whether it is the last step.

        Raises:
            Interrupted: on every rank, if `interrupt` was called.
        """

    def wait(self) -> None:
        """Wait for work in the background; raises its errors."""

    def interrupt(self) -> None:
        """Stop what takes long, now and later. May be called from any thread."""

    def serves(self, step: int) -> bool:
        """Whether the weights after `step` are served; step 0 means the initial ones."""
        return False

    def publish(self, actor: Actor, step: int) -> None:
        """Serve the actor's weights (a collective)."""

    def evaluates(self, step: int) -> bool:
        """Whether the weights after `step` are evaluated."""
        return False

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics on rank 0 (a collective). The best `test/score` decides what `best/` holds, or
        the lowest `test/loss` where there is no score."""
        return {}

    def largest(self) -> Iterator[Batch]:
        """Batches of what a loss may need whole, the largest of their kind, to see before a model
        loads whether they fit."""
        yield from ()

    def test_batch(self) -> Batch | None:
        """Rank 0: the batch on which an evaluation measures the actor's loss; None for none."""
        return None

    @property
    def unwritten(self) -> tuple[Path, OSError] | None:
        """Rank 0: the first file of the run's folder that it could not write, and why."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This rank's part of all that decides what comes next; what is the same on all ranks is
        kept only on rank 0."""

    @abstractmethod
    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue where `state_dict` was called on all ranks of a run with any number of ranks."""

    def close(self) -> None:
        """End what `start` began."""
