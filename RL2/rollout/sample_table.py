"""Samples as columns of numbers: gathering them on rank 0, and the batch, metrics and files there.

Only `SampleTable.of`, with which every driver turns its lists into tensors, goes through the tokens
one by one.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.algorithms.rewards import all_equal
from RL2.distributed.comm import concatenate_on_rank_0
from RL2.distributed.traffic import Traffic
from RL2.ops.ragged import ranges
from RL2.rollout.samples import NOT_THE_POLICY, Sample
from RL2.runtime.secrets import redact_all

_TYPECODES = {torch.int32: "i", torch.float32: "f", torch.float64: "d", torch.uint8: "B"}

# The columns that are sent, and their dtypes; wide ones first, so that all are aligned.
_SAMPLES = {
    "position": torch.int64,
    "response": torch.int64,
    "index": torch.int64,  # of the prompt in the data set
    "length": torch.int64,
    "n_turns": torch.int64,
    "empty_actions": torch.int64,
    "clipped": torch.int64,  # whether a turn was cut off at the token limit
    "failed": torch.int64,
    "n_bytes": torch.int64,  # length of its line
    "judge_tokens": torch.int64,
    "reward": torch.float64,
    "earned": torch.float64,  # without the penalty for length
    "score": torch.float64,
}
_SEQUENCES = {"sample": torch.int64, "n_tokens": torch.int64}
_TOKENS = {
    "rewards": torch.float64,
    "token_ids": torch.int32,
    "weight_versions": torch.int32,
    "llm_logps": torch.float32,
    "roles": torch.uint8,  # 0: given to the policy, 1: an action, 2: the first one of a turn
}
_TEXT = {"text": torch.uint8}

Columns = dict[str, Tensor]


def _token_columns(fields: Iterable[str]) -> dict[str, torch.dtype]:
    """The token columns with those of judges; the narrow column stays last."""
    return {"rewards": _TOKENS["rewards"]} | dict.fromkeys(fields, torch.float32) | _TOKENS


PART = "reward/"  # begins the names of the columns of several rewards


def _sample_columns(parts: Iterable[str]) -> dict[str, torch.dtype]:
    return _SAMPLES | {PART + name: torch.float64 for name in parts}


@dataclass(frozen=True)
class SampleTable:
    """Some samples.

    Attributes:
        samples: `[S]` columns, see `_sample_columns`, and `start`, where its line begins in the
            text.
        sequences: `[Q]` columns: number of the `sample`, `n_tokens`, and `start`, the offset in the
            tokens. Ordered by sample.
        tokens: columns of the tokens of all sequences. text: UTF-8, one line for each sample for
            `dump`, or empty. Both may also hold data of other samples.
    """

    samples: Columns
    sequences: Columns
    tokens: Columns
    text: Tensor

    @classmethod
    def of(
        cls,
        samples: list[Sample],
        lines: bool = False,
        fields: tuple[str, ...] = (),
        parts: tuple[str, ...] = (),
    ) -> SampleTable:
        """A table of samples. lines: whether to make the text for `dump`. fields: names of judges'
        fields to include. parts: names of several rewards to include."""
        text = [_line(sample) if lines else b"" for sample in samples]
        rows = [(i, one) for i, sample in enumerate(samples) for one in sample.sequences]
        per_sample = [
            (
                one.position,
                one.response,
                one.index,
                one.length,
                len(one.turns),
                sum(not turn.action for turn in one.turns),
                one.truncated,
                one.error is not None,
                len(line),
                one.judge_tokens,
                one.reward,
                one.earned,
                one.score,
                *(one.parts.get(name, 0.0) for name in parts),
            )
            for one, line in zip(samples, text, strict=True)
        ]
        dtypes = _sample_columns(parts)
        columns = zip(*per_sample, strict=True) if per_sample else [()] * len(dtypes)
        n_tokens = [len(one["token_ids"]) for _, one in rows]
        tokens = {}
        for name, dtype in _TOKENS.items():
            of_rows = [one["action_mask" if name == "roles" else name] for _, one in rows]
            if [len(values) for values in of_rows] != n_tokens:
                raise ValueError(f"a sequence does not have as many {name} as tokens")
            tokens[name] = _flat(of_rows, dtype)
        actions = tokens["roles"].nonzero().squeeze(1)
        tokens["roles"] = _with_turns(tokens["roles"], rows, samples)
        for name in fields:
            tokens[name] = torch.zeros(len(tokens["roles"]))
            tokens[name][actions] = _of_actions(name, rows, samples)
        tokens = {name: tokens[name] for name in _token_columns(fields)}
        return cls._of_columns(
            {
                name: torch.tensor(values, dtype=dtype)
                for (name, dtype), values in zip(dtypes.items(), columns, strict=True)
            },
            {
                "sample": torch.tensor([i for i, _ in rows], dtype=torch.int64),
                "n_tokens": torch.tensor(n_tokens, dtype=torch.int64),
            },
            tokens,
            _from_bytes(bytearray(b"".join(text)), torch.uint8),
        )

    @classmethod
    def _of_columns(
        cls, samples: Columns, sequences: Columns, tokens: Columns, text: Tensor
    ) -> SampleTable:
        return cls(
            samples | {"start": samples["n_bytes"].cumsum(0) - samples["n_bytes"]},
            sequences | {"start": sequences["n_tokens"].cumsum(0) - sequences["n_tokens"]},
            tokens,
            text,
        )

    @property
    def parts(self) -> list[str]:
        """The names of several rewards."""
        return [name.removeprefix(PART) for name in self.samples if name.startswith(PART)]

    def __len__(self) -> int:
        return len(self.samples["position"])

    def select(self, which: Tensor) -> SampleTable:
        """The samples with these indices `[k]`, in this order."""
        place = torch.full((len(self),), -1)
        place[which] = torch.arange(len(which))
        of_sequence = place[self.sequences["sample"]]
        rows = (of_sequence >= 0).nonzero().squeeze(1)
        rows = rows[of_sequence[rows].argsort(stable=True)]
        sequences = {name: column[rows] for name, column in self.sequences.items()}
        return SampleTable(
            {name: column[which] for name, column in self.samples.items()},
            sequences | {"sample": of_sequence[rows]},
            self.tokens,
            self.text,
        )

    def sorted(self) -> SampleTable:
        """All samples, ordered by position and response."""
        order = self.samples["response"].argsort(stable=True)
        return self.select(order[self.samples["position"][order].argsort(stable=True)])

    def good(self) -> SampleTable:
        """The samples that did not fail."""
        return self.select((self.samples["failed"] == 0).nonzero().squeeze(1))

    def whole(self) -> SampleTable:
        """The samples without a turn that was cut off."""
        return self.select((self.samples["clipped"] == 0).nonzero().squeeze(1))

    def without_equal_groups(self) -> tuple[SampleTable, float]:
        """Drop the groups whose rewards are equal but for penalties of length.

        Returns the remaining samples and the fraction of groups dropped (0 without groups).
        """
        positions, group = self.samples["position"].unique(return_inverse=True)
        equal = all_equal(self.samples["earned"], group, len(positions))
        kept = (~equal[group]).nonzero().squeeze(1)
        return self.select(kept), int(equal.sum()) / max(1, len(positions))


def gather_samples(
    table: SampleTable, n_ranks: int, group: dist.ProcessGroup | None, traffic: Traffic
) -> SampleTable | None:
    """The samples of all ranks of a group on its rank 0, by rank; None elsewhere (a collective).

    Two steps: the sizes of all ranks, then one message from each rank that has samples.
    """
    if n_ranks == 1:
        traffic.add("samples", 0)
        return table
    parts = (table.samples, table.sequences, table.tokens, {"text": table.text})
    fields = [name for name in table.tokens if name not in _TOKENS]
    names = (_sample_columns(table.parts), _SEQUENCES, _token_columns(fields), _TEXT)
    columns = [part[name] for of_part, part in zip(names, parts, strict=True) for name in of_part]
    buffer = torch.cat([column.view(torch.uint8) for column in columns])
    buffer = torch.nn.functional.pad(buffer, (0, -len(buffer) % 8))
    own = torch.tensor([len(next(iter(part.values()))) for part in parts] + [len(buffer)])
    sizes = [torch.empty_like(own) for _ in range(n_ranks)]
    dist.all_gather(sizes, own, group=group)
    *n_rows, n_bytes = torch.stack(sizes).T.tolist()
    # Rank 0 gets the sizes of the others, and sends all sizes to each of them.
    traffic.add("samples", sum(n_bytes[1:]) + (n_ranks - 1) * (n_ranks + 1) * 8 * len(own))
    buffer = concatenate_on_rank_0(buffer, n_bytes, group)
    if buffer is None:
        return None

    received = [
        _unpack(part, rows, names)
        for part, *rows in zip(buffer.split(n_bytes), *n_rows, strict=True)
    ]
    samples, sequences, tokens, text = (
        {name: torch.cat([columns[name] for columns in of_ranks]) for name in of_ranks[0]}
        for of_ranks in zip(*received, strict=True)
    )
    before = torch.tensor(n_rows[0]).cumsum(0) - torch.tensor(n_rows[0])
    sequences["sample"] += before.repeat_interleave(torch.tensor(n_rows[1]))
    return SampleTable._of_columns(samples, sequences, tokens, text["text"])


def _unpack(
    buffer: Tensor, n_rows: Iterable[int], parts_of: Iterable[dict[str, torch.dtype]]
) -> list[Columns]:
    """The columns of each part from one rank's bytes."""
    parts, offset = [], 0
    for names, n in zip(parts_of, n_rows, strict=True):
        columns = {}
        for name, dtype in names.items():
            columns[name] = buffer[offset : offset + n * dtype.itemsize].view(dtype)
            offset += n * dtype.itemsize
        parts.append(columns)
    return parts


def to_batch(
    table: SampleTable, n_responses: int, weights: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Tensor] | None:
    """One row per sequence, in the samples' order; None without samples.

    The fields of `RL2.datasets.collate`, with rewards in float64, and: sample_ids, group_ids and
    prompt_index (the row of the data set) [B] int64; correct [B] bool; turn_ids [B, T] int64, the
    turn (from 0) of its sample in which the policy wrote the token; weight_versions [B, T] int64,
    the weights that wrote it. The last two are -1 for tokens that the policy did not write. Judges'
    fields are [B, T] float32. With several rewards, whose weights these are: reward_parts,
    reward_weights [B, K] float64.
    """
    sample, starts = table.sequences["sample"], table.sequences["start"]
    lengths = table.sequences["n_tokens"] - 1
    if not len(sample):
        return None
    n_tokens = int(lengths.max())
    valid = torch.arange(n_tokens) < lengths[:, None]
    place = valid.flatten().nonzero().squeeze(1)
    states = ranges(starts, lengths)
    actions = states + 1  # the data of a token are at the position before it

    def padded(name: str, which: Tensor, dtype: torch.dtype, fill: float = 0) -> Tensor:
        field = torch.full((len(sample) * n_tokens,), fill, dtype=dtype)
        field[place] = table.tokens[name][which].to(dtype)
        return field.view(-1, n_tokens)

    roles = padded("roles", actions, torch.uint8)
    mask, begins = roles > 0, roles == 2
    before = begins.sum(1).cumsum(0) - begins.sum(1)  # turns in the rows above
    before = before - before[torch.searchsorted(sample, sample)]  # only those of this sample
    turn_ids = begins.cumsum(1) + before[:, None] - 1
    position = table.samples["position"][sample]
    return {
        "states": padded("token_ids", states, torch.int64),
        "actions": padded("token_ids", actions, torch.int64),
        "action_mask": mask,
        "lengths": lengths,
        "sample_ids": position * n_responses + table.samples["response"][sample],
        "group_ids": position,
        "llm_logps": padded("llm_logps", actions, torch.float32).masked_fill_(~mask, 0.0),
        "rewards": padded("rewards", actions, torch.float64).masked_fill_(~mask, 0.0),
        "correct": table.samples["reward"][sample] > 0,
        "turn_ids": turn_ids.masked_fill_(~mask, -1),
        "weight_versions": padded("weight_versions", actions, torch.int64, NOT_THE_POLICY),
        "prompt_index": table.samples["index"][sample],
        **{
            name: padded(name, actions, torch.float32)
            for name in table.tokens
            if name not in _TOKENS
        },
        **_several(table, weights),
    }


def _several(table: SampleTable, weights: Mapping[str, float]) -> Columns:
    if not weights:
        return {}
    rows = table.sequences["sample"]
    return {
        "reward_parts": torch.stack([table.samples[PART + name][rows] for name in weights], -1),
        "reward_weights": torch.tensor([*weights.values()], dtype=torch.float64).repeat(
            len(rows), 1
        ),
    }


def summarise(table: SampleTable, prefix: str) -> dict[str, float]:
    """Means over samples; only `{prefix}/n_samples` when there is none."""
    metrics = {f"{prefix}/n_samples": float(len(table))}
    if not len(table):
        return metrics

    def mean(name: str) -> float:
        return math.fsum(table.samples[name].tolist()) / len(table)

    return metrics | {
        f"{prefix}/score": mean("score"),
        f"{prefix}/reward": mean("reward"),
        f"{prefix}/avg_response_length": mean("length"),
        f"{prefix}/length_clip_ratio": mean("clipped"),
        f"{prefix}/n_turns": mean("n_turns"),
        f"{prefix}/empty_actions": float(table.samples["empty_actions"].sum()),
        **{
            ("test/" if prefix == "test" else "") + PART + name: mean(PART + name)
            for name in table.parts
        },
    }


def dump(table: SampleTable, path: Path) -> None:
    """Write the samples' lines as jsonl, all or nothing (temporary file, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    text = table.text[ranges(table.samples["start"], table.samples["n_bytes"])]
    try:
        temporary.write_bytes(text.numpy().tobytes())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _with_turns(
    actions: Tensor, rows: list[tuple[int, dict[str, list]]], samples: list[Sample]
) -> Tensor:
    """The `roles` of the tokens of all rows. actions: 1 for tokens that the policy wrote. rows:
    (number of the sample, sequence)."""
    positions = actions.nonzero().squeeze(1)
    n_actions = [0] * len(samples)
    for number, sequence in rows:
        n_actions[number] += sum(sequence["action_mask"])
    begins, start = [], 0
    for sample, n in zip(samples, n_actions, strict=True):
        of_turns = accumulate((turn.length for turn in sample.turns), initial=0)
        begins += [start + at for at in of_turns if at < n]
        start += n
    actions[positions[begins]] = 2
    return actions


def _of_actions(
    name: str, rows: list[tuple[int, dict[str, list]]], samples: list[Sample]
) -> Tensor:
    """The judges' field `name` for every token that the policy wrote; 0 in samples that failed."""
    n_actions = [0] * len(samples)
    for number, sequence in rows:
        n_actions[number] += sum(sequence["action_mask"])
    parts = []
    for sample, n in zip(samples, n_actions, strict=True):
        value = 0.0 if sample.error is not None else sample.fields[name]
        one = isinstance(value, float)
        parts.append(torch.full((n,), value) if one else torch.tensor(value, dtype=torch.float32))
    return torch.cat(parts) if parts else torch.empty(0)


def _line(sample: Sample) -> bytes:
    line = json.dumps(redact_all(_record(sample)), ensure_ascii=False) + "\n"
    # JSON allows them unescaped, but str.splitlines and other tools would split the line there.
    for separator in "\x85\u2028\u2029":
        line = line.replace(separator, f"\\u{ord(separator):04x}")
    # An answer may contain a lone surrogate; it becomes an escape that is valid JSON.
    return line.encode(errors="backslashreplace")


def _record(sample: Sample) -> dict[str, Any]:
    failed = sample.error is not None
    record = {
        "group": sample.position,
        "response_index": sample.response,
        "prompt": sample.prompt,
        "response": "".join(turn.action for turn in sample.turns),
        "score": None if failed else sample.score,
        "reward": None if failed else sample.reward,
        "length": sample.length,
        "finish_reason": sample.turns[-1].finish_reason if sample.turns else None,
        "n_turns": len(sample.turns),
    }
    if len(sample.turns) > 1:
        record["turns"] = [vars(turn) for turn in sample.turns]
    if sample.fields:
        record["fields"] = sample.fields
    if sample.parts:
        record["rewards"] = sample.parts
    if failed:
        record["error"] = sample.error
    if sample.answer is not None:
        try:
            json.dumps(sample.answer, allow_nan=False)
        except (TypeError, ValueError):
            return record
        record["answer"] = sample.answer
    return record


def _flat(lists: Iterable[list], dtype: torch.dtype) -> Tensor:
    """The numbers of all lists in one tensor (an array is three times as fast as torch.tensor)."""
    numbers = array(_TYPECODES[dtype])
    for one in lists:
        numbers.extend(one)
    return _from_bytes(numbers, dtype)


def _from_bytes(numbers: array | bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
