"""From located text to token sequences with a mask of what is learned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.datasets.base import Sequence
from RL2.datasets.continuation import continuation_encoder
from RL2.datasets.end_of_turn import EndTokens
from RL2.datasets.turns import Answer, Conversation
from RL2.runtime.errors import DataError


def tokenize_answers(
    answers: list[Answer], tokenizer: PreTrainedTokenizerBase, ends: EndTokens
) -> list[Sequence]:
    """The sequences of answers. Answers to the same prompt have the same tokens before them."""
    if not answers:
        return []
    prompts = _tokenize(tokenizer, [one.prompt for one in answers])["input_ids"]
    responses = continuation_encoder(tokenizer)([one.response for one in answers])
    sequences = []
    for one, prompt, response in zip(answers, prompts, responses, strict=True):
        ended = one.end is None or bool(response) and response[-1] in ends.ids
        response = response if ended else [*response, one.end]
        mask = [False] * len(prompt) + [True] * len(response)
        sequences.append({"token_ids": prompt + response, "action_mask": mask})
    return sequences


def tokenize_conversations(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, key: str
) -> list[Sequence]:
    """The sequences of conversations, whose tokens are those of the whole text."""
    if not conversations:
        return []
    if not tokenizer.is_fast:
        raise DataError(
            f"{key}.path: rows with messages need a fast tokenizer (character offsets); "
            'use a model that has tokenizer.json, or {"prompt", "response"} rows'
        )
    texts = [one.text for one in conversations]
    encoded = _tokenize(tokenizer, texts, return_offsets_mapping=True)
    return [
        {"token_ids": token_ids, "action_mask": _mask_of(offsets, one.spans)}
        for one, token_ids, offsets in zip(
            conversations, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def end_ids_of(sequences: Iterable[Sequence], ends: EndTokens) -> tuple[int, ...]:
    """The end tokens with which stretches that are learned end."""
    found: set[int] = set()
    for sequence in sequences:
        mask = sequence["action_mask"]
        following = [*mask[1:], False]
        rows = zip(sequence["token_ids"], mask, following, strict=True)
        found |= {token for token, action, more in rows if action and not more}
    return tuple(sorted(found & ends.special.union(ends.ids)))


def _mask_of(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """True for tokens that begin inside a span. `spans` ascend and do not overlap.

    A token that begins in the prompt and extends into the turn is not learned: in a rollout the
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
    # verbose=False avoids a warning about the model's maximum length; keep_within checks the limit
    # that counts here.
    return tokenizer(texts, add_special_tokens=False, verbose=False, **options)
