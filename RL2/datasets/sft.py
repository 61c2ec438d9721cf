"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.config.errors import DataError
from RL2.datasets.base import Sequence, keep_within, load_limited_rows, option
from RL2.datasets.prompts import (
    SFT_FORMATS,
    messages_of,
    missing_keys,
    question_prompt,
    render,
    row_error,
    text_of,
)


@dataclass(frozen=True)
class _Pair:
    """Prompt and response, tokenised apart as in a rollout, where the policy begins after the
    prompt's last token; the end-of-sequence token follows."""

    prompt: str
    response: str


@dataclass(frozen=True)
class _Conversation:
    """The chat template's text and the character ranges that the assistant wrote."""

    text: str
    spans: list[tuple[int, int]]


class SFTDataset(Dataset):
    """Token sequences with a mask over what is learned; all read and checked in the constructor.

    Rows are {"prompt", "response"}, {"question", "answer"} (the prompt text of RL, the whole answer
    as response) or {"messages"} (every assistant turn is learned; the token ids are those of the
    chat template's own rendering, which decides about end-of-turn tokens). To the first two the
    end-of-sequence token is appended unless the response already ends with it.

    An item is a Sequence {"token_ids": list[int], "action_mask": list[bool]}.

    Args:
        config: node `data`: path, max_length (tokens, null for no limit), overlong, max_examples.

    Raises:
        DataError: unreadable data, a malformed row (file and line), an overlong sequence.
    """

    def __init__(
        self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, key: str = "data"
    ) -> None:
        self.key = key
        self.batch_size_key = f"{key}.batch_size"
        if option(config, "path") is None:
            raise DataError(f"{key}.path=null: name the data to train on")
        rows = load_limited_rows(config, key)
        parsed = [_parse(row, tokenizer, rows.where(i), key) for i, row in enumerate(rows)]
        sequences: list[Sequence] = [{} for _ in parsed]
        _fill_pairs(sequences, parsed, tokenizer, key)
        _fill_conversations(sequences, parsed, tokenizer, key)
        for i, sequence in enumerate(sequences):
            if not any(sequence["action_mask"][1:]):
                raise row_error(
                    key, rows.where(i), "no token to learn (a first token has none before it)"
                )
        kept = keep_within(
            [len(sequence["token_ids"]) for sequence in sequences],
            option(config, "max_length"),
            option(config, "overlong", "error"),
            rows,
            what="sequences",
            limit_key=f"{key}.max_length",
        )
        self._sequences = [sequences[i] for i in kept]
        self.fingerprint = rows.fingerprint(kept)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self._sequences[index]


def _parse(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, key: str
) -> _Pair | _Conversation:
    if "messages" in row:
        return _conversation(tokenizer, messages_of(row, where, key), where, key)
    if "prompt" in row and "response" in row:
        return _Pair(text_of(row, "prompt", where, key), text_of(row, "response", where, key))
    if "question" in row and "answer" in row:
        question = text_of(row, "question", where, key)
        answer = text_of(row, "answer", where, key)
        return _Pair(question_prompt(tokenizer, question, where, key), answer)
    raise missing_keys(row, SFT_FORMATS, where, key)


def _conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, key: str
) -> _Conversation:
    """Find each assistant turn in the rendered text.

    A turn stands between the rendering of what comes before it, with the generation prompt, and the
    rendering up to it. Both must be prefixes of the whole, or the positions would be wrong.
    """
    text = render(tokenizer, messages, where, key, add_generation_prompt=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise row_error(key, where, "messages without an assistant turn: nothing to learn")
    if turns[0] == 0:
        raise row_error(key, where, "messages begin with an assistant turn; put a user turn before")
    special = tuple(t for t in tokenizer.all_special_tokens if t)
    spans = []
    for i in turns:
        before = render(tokenizer, messages[:i], where, key, add_generation_prompt=True)
        upto = render(tokenizer, messages[: i + 1], where, key, add_generation_prompt=False)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise row_error(
                key,
                where,
                f"the chat template renders messages[{i}] differently when turns follow it or when "
                "it is generated, so what the assistant wrote cannot be located; make one row of "
                "each assistant turn, or use another chat template",
            )
        # Templates put a newline after the end-of-turn token. The policy stops at that token.
        trimmed = upto.rstrip()
        spans.append((len(before), len(trimmed if trimmed.endswith(special) else upto)))
    return _Conversation(text, spans)


def _fill_pairs(
    sequences: list[Sequence],
    parsed: list[_Pair | _Conversation],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
) -> None:
    indices = [i for i, row in enumerate(parsed) if isinstance(row, _Pair)]
    if not indices:
        return
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"{key}.path: the tokenizer has no end-of-sequence token, so responses would not end; "
            "set eos_token in its tokenizer_config.json"
        )
    prompts = _tokenize(tokenizer, [parsed[i].prompt for i in indices])["input_ids"]
    responses = _tokenize(tokenizer, [parsed[i].response for i in indices])["input_ids"]
    for i, prompt, response in zip(indices, prompts, responses, strict=True):
        end = [] if response and response[-1] == eos else [eos]
        response = response + end
        sequences[i]["token_ids"] = prompt + response
        sequences[i]["action_mask"] = [False] * len(prompt) + [True] * len(response)


def _fill_conversations(
    sequences: list[Sequence],
    parsed: list[_Pair | _Conversation],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
) -> None:
    indices = [i for i, row in enumerate(parsed) if isinstance(row, _Conversation)]
    if not indices:
        return
    if not tokenizer.is_fast:
        raise DataError(
            f"{key}.path: rows with messages need a fast tokenizer (character offsets); "
            'use a model that has tokenizer.json, or {"prompt", "response"} rows'
        )
    encoded = _tokenize(tokenizer, [parsed[i].text for i in indices], return_offsets_mapping=True)
    for i, token_ids, offsets in zip(
        indices, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        sequences[i]["token_ids"] = token_ids
        sequences[i]["action_mask"] = _mask_of(offsets, parsed[i].spans)


def _mask_of(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """True for tokens that begin inside a span. `spans` ascend and do not overlap.

    A token that begins in the prompt and reaches into the turn is not learned: in a rollout the
    prompt ends before it.
    """
    mask = [False] * len(offsets)
    remaining = iter(spans)
    start, stop = next(remaining)
    for position, (begin, _) in enumerate(offsets):
        while begin >= stop:
            start, stop = next(remaining, (math.inf, math.inf))
        mask[position] = start <= begin
    return mask


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    # Without verbose=False a warning about the model's maximum length stands in the log; the limit
    # that counts here is checked by keep_within.
    return tokenizer(texts, add_special_tokens=False, verbose=False, **options)
