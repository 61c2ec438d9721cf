"""Rows with one or more answers to a prompt, as texts or as messages."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.datasets.end_of_turn import EndTokens
from RL2.datasets.formats import Format, Unread, format_of
from RL2.datasets.messages import messages_of, tools_of
from RL2.datasets.prompts import from_json, require_text, text_of
from RL2.datasets.rows import BadRow, type_name
from RL2.datasets.turns import Answer, Turns

Message = dict[str, Any]


class AnswerParser:
    """Turns a row into its answers; None for an answer that is empty.

    A row is a prompt text with answers as texts; or a prompt of messages (in `messages` or
    `prompt`) with answers as texts or as the messages that follow; or answers that are whole
    conversations, which begin with their prompt. An answer is the last message, a turn of the
    assistant. All messages before it are the prompt, which the answers of a row must share.
    Messages may be a JSON text, because a CSV cell can hold nothing else.

    Args:
        key: name of the config's node, for messages.
        separator: put between a prompt text and its answer, and learned.
        formats: the columns that rows may have.
        names: the columns with the answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: EndTokens,
        key: str,
        separator: str,
        formats: tuple[Format, ...],
        names: tuple[str, ...],
    ):
        self.separator, self.formats, self.names = separator, formats, names
        self.texts = {"prompt", *names}
        self.turns, self.unread = Turns(tokenizer, ends, key), Unread(key, tokenizer)

    def __call__(self, row: dict[str, Any]) -> list[Answer | None]:
        kind = format_of(row, self.formats)
        if kind is None:
            raise self._missing(row)
        row = row | {name: _opened(row[name]) for name in kind.needs if name in self.texts}
        prompt = row.get("prompt") if "prompt" in kind.needs else None
        if isinstance(prompt, str) and not any(isinstance(row[name], list) for name in self.names):
            self.unread.add_row(row, Format(kind.needs))  # tools are shown with messages only
            return [self._text(row, name) for name in self.names]
        self.unread.add_row(row, kind)
        return self._turns(row, kind)

    def _missing(self, row: dict[str, Any]) -> BadRow:
        """The error for a row that fits none of the formats, with the keys that it has."""
        wanted = [name for name in self.formats[-1].needs if name not in row]
        found = ", ".join(sorted(map(str, row))) or "none"
        forms = " or ".join(
            "{" + ", ".join(f'"{name}"' for name in one.needs) + "}" for one in self.formats
        )
        return BadRow(
            f"row without {wanted[0]}: it has the keys {found}; a row is {forms}",
        )

    def _text(self, row: dict[str, Any], name: str) -> Answer | None:
        prompt, value = text_of(row, "prompt"), row[name]
        if isinstance(value, str) and not value.strip():
            return None
        return Answer(prompt, self.separator + require_text(value, name), self.turns.last())

    def _turns(self, row: dict[str, Any], kind: Format) -> list[Answer | None]:
        # A prompt text beside whole conversations repeats what they begin with.
        columns = [
            name for name in ("messages", "prompt")
            if name in kind.needs and not (name == "prompt" and isinstance(row[name], str))
        ]  # fmt: skip
        prompt = messages_of(row, columns[0]) if columns else []
        if prompt and prompt[-1]["role"] == "assistant":
            raise BadRow(f"{columns[0]} ends with an assistant turn; it must end before the answer")
        tools = tools_of(row)
        talks = {name: _talk(prompt, row[name], name) for name in self.names}
        full = {name: talk for name, talk in talks.items() if talk is not None}
        self.unread.add_messages([message for talk in full.values() for message in talk], tools)
        _check_same_prompt(full)
        return [None if talk is None else self.turns.answer(talk, tools) for talk in talks.values()]


def _opened(value: Any) -> Any:
    """The messages of a JSON text; any other value unchanged, a text with other JSON too."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_talk = bool(found) and all(isinstance(one, dict) and "role" in one for one in found)
    return found if is_talk else value


def _talk(prompt: list[Message], value: Any, name: str) -> list[Message] | None:
    """The prompt with the answer in the column `name` as its last message; None if the answer is
    empty."""
    if isinstance(value, str) and prompt:
        answer = {"role": "assistant", "content": value}
        return [*prompt, answer | {"content": require_text(value, name)}] if value.strip() else None
    value = from_json(value, name) if isinstance(value, str) and value[:1] == "[" else value
    if not isinstance(value, list):
        advice = "give the prompt as well" if isinstance(value, str) else "it must be a text"
        raise BadRow(f"{name} is {type_name(value)}; {advice}, or a list of messages")
    if _is_empty(value):
        return None
    messages = messages_of({name: value}, name)
    repeats = prompt and messages[: len(prompt)] == prompt
    messages = messages if repeats else [*prompt, *messages]
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{name} ends with a turn of the {messages[-1]['role']}, not the assistant")
    if len(messages) == 1:
        raise BadRow(
            f"{name} begins with an assistant turn; put a user turn before, or give the prompt as "
            "a list of messages"
        )
    return messages


def _is_empty(messages: list[Any]) -> bool:
    """Whether the last turn says nothing."""
    if not messages or not isinstance(last := messages[-1], dict):
        return not messages
    content = last.get("content", False)
    blank = content is None or isinstance(content, str) and not content.strip()
    return last.get("role") == "assistant" and blank and not last.get("tool_calls")


def _check_same_prompt(talks: dict[str, list[Message]]) -> None:
    """BadRow if two conversations differ before their last turn."""
    if len(talks) < 2:
        return
    (one, first), (other, second) = talks.items()
    if first[:-1] != second[:-1]:
        pairs = zip(first[:-1], second[:-1], strict=False)
        same = [a == b for a, b in pairs]
        at = (same + [False]).index(False)
        raise BadRow(
            f"{one} and {other} differ before their last turn, from turn {at} on (counted from 0), "
            "so they answer different prompts; make a row of two answers to the same turns"
        )
