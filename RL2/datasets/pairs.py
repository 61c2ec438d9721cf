"""Pairs of a chosen and a rejected answer, for preference losses and reward models."""

from __future__ import annotations

import logging

from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets.answers import AnswerParser
from RL2.datasets.base import Sequence, keep_within, load_limited_rows, option
from RL2.datasets.end_of_turn import EndTokens, end_tokens
from RL2.datasets.formats import PAIR_ROWS
from RL2.datasets.rows import Rows
from RL2.datasets.tokenizing import end_ids_of, tokenize_answers
from RL2.runtime.errors import DataError

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


class PairDataset(Dataset):
    """Two answers to a prompt, tokenised like the rows of sft; both have the same prompt tokens.

    Rows are {"prompt", "chosen", "rejected"} (texts), {"messages", "chosen", "rejected"} (a prompt
    of messages, and texts) or {"chosen", "rejected"} (lists of messages: whole conversations, or,
    with `prompt` or `messages`, what follows those). The last turn is the answer, and all before it
    must be the same for both. `tools` goes to the chat template; `separator` is put between the
    texts of prompt and answer.

    Pairs whose answers have the same tokens teach nothing, and nor does an answer without text:
    both are left out, and counted in one warning.

    An item is {"chosen": Sequence, "rejected": Sequence}.

    Args:
        config: node `data`: path, max_length (tokens of the longer answer with its prompt, null for
            no limit), overlong, separator.
        ends: end tokens of the model; None: those of the tokenizer alone.
        scored: for a head that scores a sequence where it has read all of it: a token is added
            behind the end of each sequence, and the action mask marks only that one. (It only holds
            the place. No model reads it, and it does not count for max_length.)

    Raises:
        DataError: unreadable data, a malformed row (file and line), an overlong pair, no pair left.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        key: str = "data",
        ends: EndTokens | None = None,
        scored: bool = False,
    ) -> None:
        ends = ends or end_tokens(tokenizer)
        self.key, self.batch_size_key = key, f"{key}.batch_size"
        rows = load_limited_rows(config, key)
        separator = option(config, "separator", "")
        parse = AnswerParser(tokenizer, ends, key, separator, PAIR_ROWS, SIDES)
        parsed = rows.parsed(parse, key)
        parse.unread.report()
        full = [i for i, answers in enumerate(parsed) if None not in answers]
        answers = [answer for i in full for answer in parsed[i]]
        sequences = tokenize_answers(answers, tokenizer, ends)
        pairs = dict(zip(full, zip(sequences[::2], sequences[1::2], strict=True), strict=True))
        useful = [i for i, (chosen, rejected) in pairs.items() if chosen != rejected]
        _report(rows, key, empty=sorted({*range(len(rows))} - {*full}),
                equal=sorted({*full} - {*useful}))  # fmt: skip
        rows = rows.select((i, i + 1) for i in useful)
        found = [pairs[i] for i in useful]
        lengths = [max(len(sequence["token_ids"]) for sequence in pair) for pair in found]
        kept = keep_within(lengths, config, rows, key, "pairs")
        self.end_ids = end_ids_of((sequence for i in kept for sequence in found[i]), ends)
        form = _scored if scored else lambda sequence: sequence
        self._pairs = [dict(zip(SIDES, map(form, found[i]), strict=True)) for i in kept]
        self.fingerprint = rows.fingerprint(kept)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Sequence]:
        return self._pairs[index]


def _scored(sequence: Sequence) -> Sequence:
    """The sequence with one more token, which alone is marked."""
    ids = sequence["token_ids"]
    return {"token_ids": [*ids, ids[-1]], "action_mask": [False] * len(ids) + [True]}


def _report(rows: Rows, key: str, empty: list[int], equal: list[int]) -> None:
    """Warn about the pairs that are left out; DataError if none is left."""
    reasons = (
        ("{} with the same chosen and rejected", equal),
        ("{} with an empty response", empty),
    )
    said = ", ".join(
        f"{reason.format(len(found))} (first at {rows.where(found[0])})"
        for reason, found in reasons
        if found
    )
    if not said:
        return
    n_left_out = len(empty) + len(equal)
    if n_left_out == len(rows):
        raise DataError(
            f"{key}.path: none of the {len(rows)} pairs can be learned: {said}; give pairs of two "
            "different answers"
        )
    logger.warning("%s.path: %d of %d pairs are left out: %s", key, n_left_out, len(rows), said)
