"""Tokens of a text that continues another one.

A sentencepiece tokenizer (Llama 2, Mistral 7B, T5) puts a space before every text, and so does a
byte-level one with `add_prefix_space`. The response to `2+2=` would begin with a space that is not
in the data. Other tokenizers give the same tokens wherever the text occurs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

# Texts to put before another one, to see its tokens as they are inside a text. Several, because the
# tokens of the two must not merge. Llama 2 has a byte token for the first.
_BEFORE = ("\n", "=", "0", "a", ".", ")")


def continuation_encoder(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts that each continue another text to their token ids, without special
    tokens. `puts_something_before` is called once."""
    if not puts_something_before(tokenizer):
        return partial(_ids, tokenizer)
    return lambda texts: [_behind_another(tokenizer, text) for text in texts]


def puts_something_before(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has other tokens at the beginning than inside another text."""
    return any(_behind_another(tokenizer, text) != _ids(tokenizer, [text])[0] for text in "a1")


def _behind_another(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    alone, *joined = _ids(tokenizer, [text, *(before + text for before in _BEFORE)])
    for before, ids in zip(_ids(tokenizer, list(_BEFORE)), joined, strict=True):
        known = before and tokenizer.unk_token_id not in before
        if known and ids[: len(before)] == before and len(ids) > len(before):
            return ids[len(before) :]
    return alone


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
