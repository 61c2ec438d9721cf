"""Shared by all data sets: rows, the length limit, batches, and a loader that resumes exactly."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from RL2.datasets.readers import load_rows
from RL2.datasets.rows import Rows
from RL2.runtime.errors import DataError

logger = logging.getLogger(__name__)

# One tokenised sample: `token_ids` (n ints), `action_mask` (n bools, on token_ids positions: True
# where the policy wrote the token), further per-token lists of n floats (`llm_logps`, `rewards`),
# and ints for the whole sequence (`sample_ids`, `group_ids`).
Sequence = dict[str, Any]


def option(config: DictConfig, name: str, default: Any = None) -> Any:
    """`config[name]`, or the default if the config has no such key; the value of an enum."""
    value = config[name] if name in config else default
    return getattr(value, "value", value)


def load_limited_rows(config: DictConfig, key: str) -> Rows:
    """Rows of `{key}.path`, only the first `{key}.max_examples` if that is set."""
    rows = load_rows(config.path, key)
    limit = option(config, "max_examples")
    return rows if limit is None else rows.select([(0, min(limit, len(rows)))])


def keep_within(
    lengths: list[int],
    config: DictConfig,
    rows: Rows,
    key: str,
    what: str,
    name: str = "max_length",
    limit: int | None = None,
) -> list[int]:
    """Indices of the rows that are short enough; `overlong` says what to do about others.

    Args:
        lengths: number of tokens of every row.
        config: the data set's node, which is called `key` in messages.
        what: plural noun for the message (`prompts`).
        name: the key of the limit; limit: maximum number of tokens, by default what that key says,
            where null means none.

    Raises:
        DataError: a row is longer and `overlong` is `error`, or every row is.
    """
    limit, limit_key = option(config, name) if limit is None else limit, f"{key}.{name}"
    if limit is None:
        return list(range(len(lengths)))
    overlong = [i for i, length in enumerate(lengths) if length > limit]
    if not overlong:
        return list(range(len(lengths)))
    all_of_them = len(overlong) == len(lengths)
    found = (
        f"{limit_key}={limit}: {'all ' if all_of_them else ''}{len(overlong)} of {len(lengths)} "
        f"{what} are longer (longest {max(lengths)} tokens, first at {rows.where(overlong[0])})"
    )
    if option(config, "overlong", "error") == "error" or all_of_them:
        way_out = f"raise {_raise_hint(limit_key, name)}"
        if not all_of_them:
            way_out += f", or set {key}.overlong=drop"
        raise DataError(f"{found}; {way_out}")
    logger.warning("%s; dropped", found)
    dropped = set(overlong)
    return [i for i in range(len(lengths)) if i not in dropped]


def _raise_hint(limit_key: str, name: str) -> str:
    # The prompt limit usually follows from the other two and is not set by the user.
    if name == "max_prompt_length":
        return (
            f"actor.max_length_per_device up to the model's context (or {limit_key} if it is set)"
        )
    return f"{limit_key} and actor.max_length_per_device"


# ------------------------------------------------------------------------------ batches


def collate(sequences: list[Sequence]) -> dict[str, Tensor]:
    """Shift by one, pad on the right, stack.

    With T = longest sequence - 1, position t of a row holds the input token `states[b, t]` and the
    token after it, `actions[b, t]`; all per-token fields belong to that next token.

    Returns:
        states, actions [B, T] int64; action_mask [B, T] bool; lengths [B] int64 (valid positions);
        sample_ids, group_ids [B] int64 (the sequence's own, or 0..B-1); every further list of the
        sequences as [B, T] float32, zero where action_mask is False; every further number as [B].

    Raises:
        ValueError: no sequences, a list of the wrong length, or fields that differ between them.
    """
    if not sequences:
        raise ValueError("collate: no sequences")
    fields = set(sequences[0])
    for row, sequence in enumerate(sequences):
        if set(sequence) != fields:
            raise ValueError(
                f"collate: sequence {row} has the fields {sorted(sequence)}, "
                f"sequence 0 has {sorted(fields)}"
            )
        n = len(sequence["token_ids"])
        if n == 0:
            raise ValueError(f"collate: sequence {row} has no tokens")
        for name, value in sequence.items():
            if isinstance(value, list) and len(value) != n:
                raise ValueError(
                    f"collate: {name} of sequence {row} has {len(value)} entries for {n} tokens"
                )

    def padded(name: str, dtype: torch.dtype, part: slice) -> Tensor:
        return pad_sequence(
            [torch.tensor(sequence[name][part], dtype=dtype) for sequence in sequences],
            batch_first=True,
        )

    states_part, actions_part = slice(None, -1), slice(1, None)
    mask = padded("action_mask", torch.bool, actions_part)
    batch = {
        "states": padded("token_ids", torch.int64, states_part),
        "actions": padded("token_ids", torch.int64, actions_part),
        "action_mask": mask,
        "lengths": torch.tensor([len(sequence["token_ids"]) - 1 for sequence in sequences]),
        "sample_ids": torch.arange(len(sequences)),
        "group_ids": torch.arange(len(sequences)),
    }
    for name in sorted(fields - {"token_ids", "action_mask"}):
        if isinstance(sequences[0][name], list):
            batch[name] = padded(name, torch.float32, actions_part).masked_fill(~mask, 0.0)
        else:
            batch[name] = torch.tensor([sequence[name] for sequence in sequences])
    return batch


# ------------------------------------------------------------------------------ loader


class StatefulBatchSampler(Sampler[list[int]]):
    """Batches of indices whose position can be saved and restored at any batch.

    The order of an epoch is a function of (seed, epoch) alone, so the state is a few numbers. After
    the last batch of an epoch the state is already the start of the next one: a run that is resumed
    at the boundary continues with a new epoch and does not see an empty one first. (torchdata's
    RandomSampler keeps the state of a generator instead and has that empty epoch.)

    The position belongs to the sampler, not to an iterator: the next iteration continues an
    interrupted one, so no row is seen twice in an epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool,
        key: str,
        fingerprint: str,
    ) -> None:
        self.size = size
        self.fingerprint = fingerprint  # of the rows' content
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.key = key
        self.epoch = 0  # epochs completed
        self.position = 0  # rows of the current epoch already returned

    def __len__(self) -> int:
        """Number of batches of a whole epoch."""
        return len(range(0, self._end(), self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        starts = range(self.position, self._end(self.position), self.batch_size)
        if not starts:
            # Only after a change of batch size: less than one batch of this epoch was left.
            self.epoch, self.position = self.epoch + 1, 0
            order, starts = self.order(self.epoch), range(0, self._end(), self.batch_size)
        for start in starts:
            if start == starts[-1]:
                self.epoch, self.position = self.epoch + 1, 0
            else:
                self.position = start + self.batch_size
            yield order[start : start + self.batch_size]

    def _end(self, start: int = 0) -> int:
        """Where the last batch of an epoch ends, if batches begin at `start`."""
        left = self.size - start
        return self.size - left % self.batch_size if self.drop_last else self.size

    def order(self, epoch: int) -> list[int]:
        """Row indices in the order of `epoch`."""
        order = list(range(self.size))
        # A string seed goes through SHA-512: (seed, epoch) and (epoch, seed) share nothing.
        # (torch's CPU generator keeps only the lower 32 bits of a seed.)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "size": self.size,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, in the order of the seed that it was taken with."""
        other = None
        if state["size"] != self.size:
            other = f"has {self.size} rows, the checkpoint was written with {state['size']}"
        elif state["fingerprint"] != self.fingerprint:
            other = f"has {self.size} rows, but not those that the checkpoint was written with"
        if other is not None:
            raise DataError(
                f"{self.key}.path: the data set {other}; resume with the same data, or start "
                "without trainer.load_ckpt_from"
            )
        self.epoch, self.position, self.seed = state["epoch"], state["position"], state["seed"]


def make_loader(
    dataset: Dataset, batch_size: int, seed: int, drop_last: bool = True
) -> StatefulDataLoader:
    """Loader over `dataset`, whose `state_dict` resumes exactly, within or between epochs.

    `loader.batch_sampler.epoch` counts the completed epochs. The global random state is not
    touched. `state_dict()` can be written as JSON.

    Args:
        dataset: needs `key` and `batch_size_key` (for messages), and `fingerprint`, which says
            whether a checkpoint was written with the same rows.

    Returns:
        An iterable of lists of items.

    Raises:
        DataError: fewer rows than one batch with drop_last.
    """
    setting = f"{dataset.batch_size_key}={batch_size}"
    if drop_last and len(dataset) < batch_size:
        raise DataError(
            f"{setting}: data set has only {len(dataset)} rows; lower it to at most "
            f"{len(dataset)}, or give more data in {dataset.key}.path"
        )
    if said := _remainder(len(dataset), batch_size, drop_last):
        logger.info("%s: %s", setting, said)
    sampler = StatefulBatchSampler(
        len(dataset), batch_size, seed, drop_last=drop_last, key=dataset.key,
        fingerprint=dataset.fingerprint,
    )  # fmt: skip
    # Each new iterator of a loader draws a number. Drawing from its own generator leaves the global
    # one unchanged, so that a resumed run, which makes one more iterator, samples the same.
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch 2.13 deprecates; users cannot change that.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(
            dataset, batch_sampler=sampler, collate_fn=list, generator=generator
        )


def _remainder(n_rows: int, batch_size: int, drop_last: bool) -> str | None:
    """The message about rows of an epoch that do not fill a batch."""
    left = n_rows % batch_size
    if not left:
        return None
    if drop_last:
        return f"each epoch leaves out {left} of {n_rows} rows, different ones each time"
    if n_rows < batch_size:
        return f"the data set has only {n_rows} rows, so each step takes all of them"
    return f"the last step of each epoch takes the remaining {left} of {n_rows} rows"
