"""What an assistant wrote, located in the text of a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.datasets.end_of_turn import EndTokens
from RL2.datasets.messages import learned_turns
from RL2.datasets.prompts import render
from RL2.datasets.rows import BadRow
from RL2.runtime.errors import DataError


@dataclass(frozen=True)
class Answer:
    """Prompt and response, tokenised separately as in a rollout, where the policy begins after the
    prompt's last token; then the token `end`, unless the response ends with an end token. None for
    `end` adds nothing.

    A space that the tokenizer puts before every text is not put between the two. The end of the
    prompt and the beginning of the response are never merged into one token.
    """

    prompt: str
    response: str
    end: int | None


@dataclass(frozen=True)
class Conversation:
    """The chat template's text and the character ranges that are learned, each of which ends with
    an end token."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant at the end of a conversation.

    Attributes:
        shown: the chat template's text up to and including the turn.
        start, end: where what is learned begins and ends in it.
        is_closed: whether that ends with an end token.
    """

    shown: str
    start: int
    end: int
    is_closed: bool

    @property
    def learned(self) -> str:
        """The text up to the end of what is learned."""
        return self.shown[: self.end]


class Turns:
    """Finds the turns of the assistant in rendered conversations.

    Args:
        key: name of the config's node, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: EndTokens, key: str):
        self.tokenizer, self.ends, self.key = tokenizer, ends, key
        # Their texts. Only special and added tokens appear unchanged in a text.
        whole = ends.special | tokenizer.added_tokens_decoder.keys()
        self.stops = _texts(tokenizer, whole.intersection(ends.ids))
        self.special = _texts(tokenizer, ends.special)

    def last(self) -> int:
        """The token to put after a text without an end."""
        if self.ends.last is None:
            raise DataError(
                f"{self.key}.path: the tokenizer has no end-of-sequence token, so responses would "
                "not end; set eos_token in its tokenizer_config.json"
            )
        return self.ends.last

    def answer(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Answer:
        """The last message, an assistant's turn, as the answer to those before it."""
        shown = partial(render, self.tokenizer, tools=tools)
        turn = self._located(messages, len(messages) - 1, shown)
        end = None if turn.is_closed else self.last()
        return Answer(turn.shown[: turn.start], turn.shown[turn.start : turn.end], end)

    def conversations(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[Conversation]:
        """All assistant turns that are learned, each behind what the policy sees when it writes it:
        the chat template's text of the turns before, with the generation prompt.

        One conversation, if what was shown and written before each turn stays as it is in the
        template's text of all messages. Where a template shows a turn in another way when turns
        follow (without its thoughts, or with another end), a further conversation begins at the
        next one.
        """
        shown = partial(render, self.tokenizer, tools=tools)
        text = shown(messages, add_generation_prompt=False)
        indices = learned_turns(messages)
        if indices[0] == 0:
            raise BadRow("messages begin with an assistant turn; put a user turn before")
        turns = [self._located(messages, i, shown) for i in indices]
        if all(text.startswith(turn.learned) for turn in turns):
            return [self._written(turns, text)]
        parts: list[list[_Turn]] = []
        for turn in turns:
            if parts and turn.shown.startswith(parts[-1][-1].learned):
                parts[-1].append(turn)
            else:
                parts.append([turn])
        texts = [part[-1].learned for part in parts]
        if text.startswith(texts[-1]):
            texts[-1] = text
        return [self._written(part, text) for part, text in zip(parts, texts, strict=True)]

    def _located(self, messages: list[dict[str, Any]], i: int, shown: Callable[..., str]) -> _Turn:
        """The text of the assistant's turn `i` as the last one of a conversation."""
        before = shown(messages[:i], add_generation_prompt=True)
        upto = shown(messages[: i + 1], add_generation_prompt=False)
        if not upto.startswith(before):
            raise BadRow(
                f"the chat template renders messages[{i}] differently when it is generated, so "
                "what the assistant wrote cannot be located; use another chat template"
            )
        end, is_closed = self._end(upto.removeprefix(before), messages[i].get("content") or "")
        return _Turn(upto, len(before), len(before) + end, is_closed)

    def _written(self, turns: list[_Turn], text: str) -> Conversation:
        """The text with an end behind each of the turns, all of which it shows."""
        pieces, spans, done, n_written = [], [], 0, 0
        for turn in turns:
            end, closing = turn.end, ""
            if not turn.is_closed:
                rest = text[len(turn.shown) :] if text.startswith(turn.shown) else ""
                marker = _starts_with(rest.lstrip(), self.stops)
                if marker:
                    end = len(text) - len(rest.lstrip()) + len(marker)
                else:
                    closing = self.tokenizer.convert_ids_to_tokens(self.last())
            start = n_written + turn.start - done
            pieces += [text[done:end], closing]
            n_written += end - done + len(closing)
            spans.append((start, n_written))
            done = end
        return Conversation("".join([*pieces, text[done:]]), spans)

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
