"""Which columns of a row are read, and a warning about the others."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SHOWN = 12  # names in one line


@dataclass(frozen=True)
class Format:
    """Columns that a row of this kind must have, and columns that are also read."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


RL_ROWS = (
    Format(("messages",), ("tools", "extra_info", "answer")),
    Format(("prompt",), ("extra_info", "answer")),
    Format(("question", "answer"), ("extra_info",)),
)
SFT_ROWS = (
    Format(("messages",), ("tools",)),
    Format(("prompt", "response")),
    Format(("question", "answer")),
)
PAIR_ROWS = (
    Format(("messages", "chosen", "rejected"), ("tools",)),
    Format(("prompt", "chosen", "rejected"), ("tools",)),
    Format(("chosen", "rejected"), ("tools",)),
)
LABEL_ROWS = (
    Format(("messages", "completion", "label"), ("tools",)),
    Format(("prompt", "completion", "label"), ("tools",)),
)


def format_of(row: dict[str, Any], formats: tuple[Format, ...]) -> Format | None:
    """The first format for which the row has all columns; None if there is none.

    Rows of several formats in one columnar file have null in the columns of other formats. A row
    with nothing but nulls keeps its format, whose check names the null.
    """
    fitting = [one for one in formats if all(name in row for name in one.needs)]
    filled = [one for one in fitting if all(row[name] is not None for name in one.needs)]
    return next(iter(filled or fitting), None)


class Unread:
    """Counts the columns and fields that are not read, for one warning at the end."""

    def __init__(self, key: str, tokenizer: PreTrainedTokenizerBase):
        self.key = key
        template = tokenizer.chat_template or ""
        named = template.values() if isinstance(template, dict) else [template]
        self.template = "\n".join(named)
        self.columns: Counter[str] = Counter()
        self.unseen: Counter[str] = Counter()

    def add_row(self, row: dict[str, Any], kind: Format) -> None:
        read = kind.needs + kind.takes
        self.columns.update(k for k, value in row.items() if value is not None and k not in read)

    def add_messages(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        """A template's text names the fields that it shows."""
        names = {name for message in messages for name in message}
        names -= {"role", "content", "weight"}
        found = {f"{name} (of messages)" for name in names if name not in self.template}
        self.unseen.update(found | ({"tools"} if tools and "tools" not in self.template else set()))

    def report(self) -> None:
        if self.columns:
            logger.warning("%s.path: columns that are not read: %s", self.key, _text(self.columns))
        if self.unseen:
            logger.warning(
                "%s.path: the chat template does not show: %s", self.key, _text(self.unseen)
            )


def _text(counts: Counter[str]) -> str:
    shown = [f"{name!s:.60} in {n} rows" for name, n in counts.most_common(_SHOWN)]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
