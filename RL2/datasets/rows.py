"""Rows of a data set, each with the file and line that it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from RL2.runtime.errors import DataError

T = TypeVar("T")


class BadRow(ValueError):
    """What is wrong with a row, and what to do. `Rows.parsed` adds the row's position."""


@dataclass(frozen=True)
class Rows:
    """Rows of a data set and their positions.

    Attributes:
        rows: one dict per row.
        places: for each row the text before its number in messages, `file:` or `file: row `.
        numbers: for each row the physical line on which it begins, or its number among the rows if
            the format has no lines (parquet, arrow, hub); both from 1.
    """

    rows: list[dict[str, Any]]
    places: list[str]
    numbers: list[int]

    @classmethod
    def of_lines(cls, rows: list[dict[str, Any]], file: str, lines: list[int]) -> Rows:
        """Rows of a text file."""
        return cls(rows, [f"{file}:"] * len(rows), lines)

    @classmethod
    def without_lines(cls, rows: list[dict[str, Any]], source: str) -> Rows:
        """Rows of a source that has no lines."""
        return cls(rows, [f"{source}: row "] * len(rows), list(range(1, len(rows) + 1)))

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Rows:
        """The rows of all parts, one after another."""
        joined = cls([], [], [])
        for part in parts:
            joined.rows.extend(part.rows)
            joined.places.extend(part.places)
            joined.numbers.extend(part.numbers)
        return joined

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def where(self, index: int) -> str:
        """`file:line`, or `file: row n` if the format has no lines."""
        return f"{self.places[index]}{self.numbers[index]}"

    def error(self, index: int, key: str, problem: object) -> DataError:
        """`{key}.path: file:line: problem`."""
        return DataError(f"{key}.path: {self.where(index)}: {problem}")

    def parsed(self, parse: Callable[[dict[str, Any]], T], key: str) -> list[T]:
        """The result of `parse` for each row.

        Raises:
            DataError: `parse` raised BadRow.
        """
        found = []
        for index, row in enumerate(self.rows):
            try:
                found.append(parse(row))
            except BadRow as error:
                raise self.error(index, key, error) from error
            except RecursionError as error:
                problem = "is nested too deeply to be read; make it flatter"
                raise self.error(index, key, problem) from error
        return found

    def fingerprint(self, indices: Iterable[int]) -> str:
        """SHA-256 over the content of these rows, whatever their source. Of a value that JSON does
        not have (a date, an image), only the type counts."""
        digest = sha256()
        for index in indices:
            row = json.dumps(self.rows[index], default=type_name, sort_keys=True)
            digest.update(row.encode() + b"\n")
        return digest.hexdigest()

    def select(self, spans: Iterable[tuple[int, int]]) -> Rows:
        """Rows of the half-open ranges `spans`, in that order."""
        indices = [i for start, stop in spans for i in range(start, stop)]
        return Rows(
            [self.rows[i] for i in indices],
            [self.places[i] for i in indices],
            [self.numbers[i] for i in indices],
        )


def without_nested_nulls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a columnar file without the nulls inside their values.

    All rows of such a file have the same fields. A null marks a field that the row does not have:
    the arguments of other calls, the fields of other messages. (An intended null looks the same;
    JSON files keep those.) Columns stay, and so do nulls that are items of a list.
    """
    return [{column: _without_nulls(value) for column, value in row.items()} for row in rows]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def type_name(value: Any) -> str:
    """The kind of a value, in the words of a data file."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "infinite"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
