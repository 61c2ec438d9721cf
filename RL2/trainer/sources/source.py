"""What a source is: where a step's batch comes from, and who gets the weights after it."""

# ruff: noqa: B027  what is empty here is what most sources need not have

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
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
    """Where batches come from. The loop knows no more of a source than what stands here.

    `trainer.source` names one: a key of `SOURCES`, or a class of your own that is derived from this
    one (`my_source.py:MySource`). Every rank makes it, before any model loads, with the run's
    config, the actor's tokenizer and its end tokens; that is where it reads its data and complains
    of them. Without an engine it needs `collect`, its position (`state_dict`, `load_state_dict`),
    `steps_per_epoch` and `per_step`. For a data set of another kind it is shorter to derive from
    `RowSource`, which needs `read` and `batch`.

    Attributes:
        groups: of the config, that it reads.
        steps_per_epoch: how many steps `trainer.n_epochs` counts as one epoch.
        per_step: what one step takes, in words.
        datasets: what was read, by the config's node whose `path` names it; each has a length and a
            `fingerprint`. A run that resumes compares them.
        rows: how many rows there are, by what they are for.
        end_ids: tokens at which its sequences end. ends: what ends there, in words.
    """

    groups: tuple[str, ...] = ()
    steps_per_epoch: int
    per_step: str
    datasets: Mapping[str, Dataset] = {}
    rows: Mapping[str, int] = {}
    end_ids: Collection[int] = ()
    ends: str = "turns are learned to end"

    @abstractmethod
    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens):
        """Read the data; nothing here waits for other ranks."""

    @classmethod
    def brings(cls, config: DictConfig) -> tuple[str, ...]:
        """Fields of its batches that a loss or an estimator may ask for. With `advantages` among
        them, `adv` is not asked for any. `RL2.datasets.collate` makes what every batch has, and
        `correct [B]` belongs to it."""
        return ()

    def start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load what generates, once the models are there. dtype: what the actor computes in."""

    @abstractmethod
    def collect(self, step: int, last: bool) -> Result:
        """The batch of a step and its metrics on rank 0, None and {} elsewhere (a collective); None
        on rank 0, too, where there is nothing to train on. last: no step follows.

        Raises:
            Interrupted: on every rank, where `interrupt` was called.
        """

    def wait(self) -> None:
        """Return when nothing goes on beside the training; raises the errors of what did."""

    def interrupt(self) -> None:
        """Give up what takes long, now and later. May be called from any thread."""

    def serves(self, step: int) -> bool:
        """Whether somebody gets the weights that `step` has left; step 0: those of the start."""
        return False

    def publish(self, actor: Actor, step: int) -> None:
        """Give them the weights (a collective)."""

    def evaluates(self, step: int) -> bool:
        """Whether the weights that `step` has left are evaluated."""
        return False

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics on rank 0 (a collective). The best `test/score` decides what `best/` holds."""
        return {}

    @property
    def unwritten(self) -> tuple[Path, OSError] | None:
        """Rank 0: the first file of the run's folder that it could not write, and why."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next, of this rank; what is the same on all ranks is kept on
        rank 0 alone."""

    @abstractmethod
    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue where `state_dict` was called on all ranks of a run, of however many ranks."""

    def close(self) -> None:
        """End what `start` has begun."""
