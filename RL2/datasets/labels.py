"""Answers that are each labelled as desired or not, for KTO."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets.answers import AnswerParser
from RL2.datasets.base import Sequence, keep_within, load_limited_rows, option
from RL2.datasets.end_of_turn import EndTokens, end_tokens
from RL2.datasets.formats import LABEL_ROWS
from RL2.datasets.rows import BadRow, type_name
from RL2.datasets.tokenizing import end_ids_of, tokenize_answers
from RL2.datasets.turns import Answer
from RL2.runtime.errors import DataError

logger = logging.getLogger(__name__)

_LABELS = {"true": 1.0, "1": 1.0, "false": -1.0, "0": -1.0, "-1": -1.0}


class LabelDataset(Dataset):
    """Answers with a label, tokenised like the rows of sft.

    Rows are {"prompt", "completion", "label"}, prompt and completion as texts or as lists of
    messages, or {"messages", "completion", "label"}. The label is true or false (in a CSV cell also
    as text); 1, 0 and -1 mean the same. Rows with an empty completion are left out and counted.

    An item is a Sequence with `labels`, 1 for desired and -1 for undesired at every token.

    Args: those of `PairDataset`.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        key: str = "data",
        ends: EndTokens | None = None,
    ) -> None:
        ends = ends or end_tokens(tokenizer)
        self.key, self.batch_size_key = key, f"{key}.batch_size"
        rows = load_limited_rows(config, key)
        separator = option(config, "separator", "")
        parse = AnswerParser(tokenizer, ends, key, separator, LABEL_ROWS, ("completion",))

        def labelled(row: dict[str, Any]) -> tuple[Answer | None, float]:
            (answer,) = parse(row)
            return answer, _label(row["label"])

        parsed = rows.parsed(labelled, key)
        parse.unread.report()
        full = [i for i, (answer, _) in enumerate(parsed) if answer is not None]
        if n_empty := len(rows) - len(full):
            first = next(i for i, (answer, _) in enumerate(parsed) if answer is None)
            said = f"empty completions, the first at {rows.where(first)}"
            if not full:
                raise DataError(f"{key}.path: all {n_empty} rows have {said}; give some text")
            logger.warning("%s.path: %d of %d rows are left out: %s", key, n_empty, len(rows), said)
        sequences = tokenize_answers([parsed[i][0] for i in full], tokenizer, ends)
        rows = rows.select((i, i + 1) for i in full)
        lengths = [len(sequence["token_ids"]) for sequence in sequences]
        kept = keep_within(lengths, config, rows, key, "sequences")
        self._items = [
            sequences[i] | {"labels": [parsed[full[i]][1]] * len(sequences[i]["token_ids"])}
            for i in kept
        ]
        self.end_ids = end_ids_of(self._items, ends)
        self.fingerprint = rows.fingerprint(kept)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sequence:
        return self._items[index]


def mismatched(items: list[Sequence], max_length: int | None = None) -> list[Sequence]:
    """Each item's prompt with the answer of the item before it (of the last one for the first),
    labelled 0: samples of unrelated answers, from which KTO estimates the KL to the reference.

    max_length: answers are cut where the sequence would be longer.
    """
    found = []
    for item, other in zip(items, [*items[-1:], *items[:-1]], strict=True):
        n, start = item["action_mask"].index(True), other["action_mask"].index(True)
        answer = other["token_ids"][start:]
        if max_length is not None:
            answer = answer[: max(1, max_length - n)]
        mask = [False] * n + [True] * len(answer)
        ids = [*item["token_ids"][:n], *answer]
        found.append({"token_ids": ids, "action_mask": mask, "labels": [0.0] * len(ids)})
    return found


def _label(value: Any) -> float:
    text = str(value).strip().lower() if isinstance(value, (bool, int, float, str)) else ""
    text = text.removesuffix(".0")
    if text not in _LABELS:
        shown = repr(value) if isinstance(value, (str, int, float)) else type_name(value)
        raise BadRow(f"label is {shown:.40}; use true for a desired answer and false for another")
    return _LABELS[text]
