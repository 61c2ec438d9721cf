"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets.base import Sequence, keep_within, load_limited_rows, option
from RL2.datasets.continuation import continuation_encoder
from RL2.datasets.end_of_turn import EndTokens, end_tokens
from RL2.datasets.formats import SFT_ROWS, Unread, format_of
from RL2.datasets.messages import learned_turns, messages_of, tools_of
from RL2.datasets.prompts import (
    SFT_FORMATS,
    missing_keys,
    question_prompt,
    render,
    text_of,
)
from RL2.datasets.rows import BadRow
from RL2.runtime.errors import DataError


@dataclass(frozen=True)
class _Pair:
    """Prompt and response, tokenised separately as in a rollout, where the policy begins after the
    prompt's last token; then the token `end`.

    A space that the tokenizer puts before every text is not put between the two. The end of the
    prompt and the beginning of the response are never merged into one token.
    """

    prompt: str
    response: str
    end: int


@dataclass(frozen=True)
class _Conversation:
    """The chat template's text and the character ranges that are learned, each of which ends with
    an end token."""

    text: str
    spans: list[tuple[int, int]]


class SFTDataset(Dataset):
    """Token sequences with a mask of what is learned; all are read and checked in the constructor.

    Rows are {"prompt", "response"}, {"question", "answer"} (the prompt text of RL, the whole answer
    as response) or {"messages"} (every assistant turn is learned; the token ids are those of the
    chat template's own rendering).

    What is learned ends as a rollout does, with an end token: the one with which the chat template
    closes the turn, or the marker of the next role if that is an end token (GLM). If a text has
    neither, `eos_token` is added: after the response of the first two kinds of rows, unless it
    already ends with an end token, and after an assistant turn that the template leaves open.

    With {"messages"}, `tools` is passed to the chat template, and a turn with `weight` 0 is not
    learned. `separator` is put between prompt and response of {"prompt", "response"}. It is
    learned, as the prompt of a rollout does not include it.

    end_ids: the tokens that end what is learned.

    An item is a Sequence {"token_ids": list[int], "action_mask": list[bool]}.

    Args:
        config: node `data`: path, max_length (tokens, null for no limit), overlong, max_examples,
            separator.
        ends: end tokens of the model; None: those of the tokenizer alone.

    Raises:
        DataError: unreadable data, a malformed row (file and line), an overlong sequence.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        key: str = "data",
        ends: EndTokens | None = None,
    ) -> None:
        ends = ends or end_tokens(tokenizer)
        self.key = key
        self.batch_size_key = f"{key}.batch_size"
        rows = load_limited_rows(config, key)
        parse = _Parser(tokenizer, ends, key, option(config, "separator", ""))
        parsed = rows.parsed(parse, key)
        parse.unread.report()
        sequences: list[Sequence] = [{} for _ in parsed]
        _fill_pairs(sequences, parsed, tokenizer, ends)
        _fill_conversations(sequences, parsed, tokenizer, key)
        for i, sequence in enumerate(sequences):
            if not any(sequence["action_mask"][1:]):
                problem = "no token to learn (the first token of a row cannot be learned)"
                raise rows.error(i, key, problem)
        kept = keep_within(
            [len(sequence["token_ids"]) for sequence in sequences],
            option(config, "max_length"),
            option(config, "overlong", "error"),
            rows,
            what="sequences",
            limit_key=f"{key}.max_length",
        )
        self._sequences = [sequences[i] for i in kept]
        self.end_ids = tuple(sorted(_last_ids(self._sequences) & ends.special.union(ends.ids)))
        self.fingerprint = rows.fingerprint(kept)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self._sequences[index]


class _Parser:
    """Turns a row into a prompt and a response, or into a conversation."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: EndTokens, key: str, separator: str
    ):
        self.tokenizer, self.ends, self.key = tokenizer, ends, key
        self.separator, self.unread = separator, Unread(key, tokenizer)
        # Their texts. Only special and added tokens appear unchanged in a text.
        whole = ends.special | tokenizer.added_tokens_decoder.keys()
        self.stops = _texts(tokenizer, whole.intersection(ends.ids))
        self.special = _texts(tokenizer, ends.special)

    def __call__(self, row: dict[str, Any]) -> _Pair | _Conversation:
        kind = format_of(row, SFT_ROWS)
        if kind is None:
            raise missing_keys(row, SFT_FORMATS)
        self.unread.add_row(row, kind)
        if "messages" in kind.needs:
            messages, tools = messages_of(row), tools_of(row)
            self.unread.add_messages(messages, tools)
            return self._conversation(messages, tools)
        if "prompt" in kind.needs:
            prompt, response = (text_of(row, name) for name in kind.needs)
            return _Pair(prompt, self.separator + response, self._last())
        question, answer = text_of(row, "question"), text_of(row, "answer")
        prompt = question_prompt(self.tokenizer, question)
        # If there is a chat template, it gives both the prompt and the end.
        last, turn = self._last(), self.ends.turn
        return _Pair(prompt, answer, last if turn is None else turn)

    def _conversation(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> _Conversation:
        """Find each assistant turn that is learned in the rendered text.

        A turn is the text between the rendering of all turns before it, with the generation prompt,
        and the rendering that includes it. Both must be prefixes of the whole, the second up to the
        end of the turn, or the positions would be wrong.
        """
        tokenizer = self.tokenizer
        shown = partial(render, tokenizer, tools=tools)
        text = shown(messages, add_generation_prompt=False)
        turns = learned_turns(messages)
        if turns[0] == 0:
            raise BadRow("messages begin with an assistant turn; put a user turn before")
        pieces, spans, done, n_written = [], [], 0, 0
        for i in turns:
            before = shown(messages[:i], add_generation_prompt=True)
            upto = shown(messages[: i + 1], add_generation_prompt=False)
            turn = upto.removeprefix(before)
            words, is_closed = self._end(turn, messages[i].get("content") or "")
            end = len(before) + words
            if not (upto.startswith(before) and text.startswith(upto[:end])):
                raise BadRow(
                    f"the chat template renders messages[{i}] differently when turns follow it or "
                    "when it is generated, so what the assistant wrote cannot be located; make one "
                    "row of each assistant turn, or use another chat template",
                )
            closing = ""
            if not is_closed:
                rest = text[len(upto) :] if text.startswith(upto) else ""
                marker = _starts_with(rest.lstrip(), self.stops)
                if marker:
                    end = len(text) - len(rest.lstrip()) + len(marker)
                else:
                    closing = tokenizer.convert_ids_to_tokens(self._last())
            start = n_written + len(before) - done
            pieces += [text[done:end], closing]
            n_written += end - done + len(closing)
            spans.append((start, n_written))
            done = end
        return _Conversation("".join([*pieces, text[done:]]), spans)

    def _last(self) -> int:
        if self.ends.last is None:
            raise DataError(
                f"{self.key}.path: the tokenizer has no end-of-sequence token, so responses would "
                "not end; set eos_token in its tokenizer_config.json"
            )
        return self.ends.last

    def _end(self, turn: str, content: str) -> tuple[int, bool]:
        """Where the learned part of a turn ends, and whether an end token closes it.

        Templates put a newline, or more, after the token that ends a turn; the policy stops at that
        token.
        """
        words = content.strip()
        found = turn.rfind(words) if words else -1
        behind = found + len(words) if found >= 0 else 0
        tail = turn[behind:]
        stops = [(tail.find(stop), -len(stop)) for stop in self.stops if stop in tail]
        if stops:
            at, length = min(stops)
            return behind + at - length, True
        if tail.rstrip().endswith(self.special):  # other ends of turns (Llama 3: a tool call)
            return behind + len(tail.rstrip()), True
        own = content[len(content.rstrip()) :]
        if found >= 0 and tail.isspace() and tail.startswith(own):
            return behind + len(own), False
        return len(turn.rstrip()), False


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> tuple[str, ...]:
    return tuple(text for text in tokenizer.convert_ids_to_tokens(list(ids)) if text)


def _starts_with(text: str, starts: tuple[str, ...]) -> str:
    """The longest of `starts` with which the text begins, or nothing."""
    return max((one for one in starts if text.startswith(one)), key=len, default="")


def _last_ids(sequences: list[Sequence]) -> set[int]:
    """The last token of each stretch that is learned."""
    found: set[int] = set()
    for sequence in sequences:
        mask = sequence["action_mask"]
        following = [*mask[1:], False]
        rows = zip(sequence["token_ids"], mask, following, strict=True)
        found |= {token for token, action, more in rows if action and not more}
    return found


def _fill_pairs(
    sequences: list[Sequence],
    parsed: list[_Pair | _Conversation],
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
) -> None:
    indices = [i for i, row in enumerate(parsed) if isinstance(row, _Pair)]
    if not indices:
        return
    prompts = _tokenize(tokenizer, [parsed[i].prompt for i in indices])["input_ids"]
    responses = continuation_encoder(tokenizer)([parsed[i].response for i in indices])
    for i, prompt, response in zip(indices, prompts, responses, strict=True):
        end = [] if response and response[-1] in ends.ids else [parsed[i].end]
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
