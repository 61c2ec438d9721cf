"""JSON lines, JSON and CSV, each gzipped or not.

They are parsed here and not by a data-frame library for two reasons: an error can name the physical
line, and values keep their types (one column type for all rows would turn `extra_info` of different
shapes into nulls).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from RL2.datasets.rows import Rows, type_name
from RL2.runtime.errors import DataError, one_line
from RL2.runtime.json_objects import reject_duplicate_keys

_GZIP = b"\x1f\x8b"  # how a compressed file begins, whatever its name
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_HEADER = 2**20  # characters in which the header must end
_SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
_BEGIN = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*(\])?[ \t\r\n]*")  # group 1: the list ends here
_NEXT = re.compile(r"(?:,|(\]))[ \t\r\n]*")


def _read_text(name: str, key: str) -> str:
    with open(name, "rb") as file:
        data = file.read()
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{key}.path: {name}: does not decompress ({one_line(error)}); copy or download "
                "it again"
            ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark the codec counts from the end of it.
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, start) + 1
        column = start - data.rfind(b"\n", 0, start)
        raise DataError(
            f"{key}.path: {name}:{line}:{column}: byte 0x{data[start]:02x} at offset {start} "
            "is not UTF-8; save the file as UTF-8"
        ) from error


def read_jsonl(name: str, key: str) -> Rows:
    return _parse_jsonl(_read_text(name, key), name, key)


def _parse_jsonl(text: str, name: str, key: str) -> Rows:
    rows, lines = [], []
    # Not splitlines(): JSON strings may contain U+2028 and similar characters unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line, object_pairs_hook=reject_duplicate_keys))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{key}.path: {_place(name, number, error)}; each line holds one object, for "
                'example {"question": "...", "answer": "... #### 42"}'
            ) from error
        lines.append(number)
    return _objects(rows, lines, name, key)


def read_json(name: str, key: str) -> Rows:
    """A list of objects, or objects one after another (JSON lines in a .json file).

    Elements are decoded one by one to know their positions.
    """
    text = _read_text(name, key)
    begin = _BEGIN.match(text)
    if begin is None:
        return _parse_jsonl_or_object(text, name, key)
    decoder = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys)
    rows, lines = [], []
    position, is_last, line, counted = begin.end(), begin[1], 1, 0
    try:
        while not is_last:
            line, counted = line + text.count("\n", counted, position), position
            row, position = decoder.raw_decode(text, position)
            rows.append(row)
            lines.append(line)
            position = _SPACE.match(text, position).end()
            following = _NEXT.match(text, position)
            if following is None:
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
            position, is_last = following.end(), following[1]
        if position < len(text):
            raise json.JSONDecodeError("text after the closing ']'", text, position)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):
            error = json.JSONDecodeError(one_line(error), text, position)
        raise DataError(
            f"{key}.path: {_place(name, error.lineno, error)}; the file holds one list of objects"
        ) from error
    return _objects(rows, lines, name, key)


def _parse_jsonl_or_object(text: str, name: str, key: str) -> Rows:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _parse_jsonl(text, name, key)
    if isinstance(whole, dict) and "\n" not in text.strip():
        return _parse_jsonl(text, name, key)
    found = f"an object with keys {sorted(whole)[:8]}" if isinstance(whole, dict) else repr(whole)
    raise DataError(
        f"{key}.path: {name}: the top level is {found[:120]}; a .json file holds a list of rows "
        "(or one row per line, as .jsonl does)"
    )


def _place(name: str, line: int, error: Exception) -> str:
    """`file:line:column: not JSON (reason)`, the column in bytes, where it is known."""
    if not isinstance(error, json.JSONDecodeError):
        return f"{name}:{line}: not JSON ({one_line(error)})"
    before = error.doc[error.doc.rfind("\n", 0, error.pos) + 1 : error.pos]
    return f"{name}:{line}:{len(before.encode()) + 1}: not JSON ({error.msg})"


def _objects(rows: list[Any], lines: list[int], name: str, key: str) -> Rows:
    for row, line in zip(rows, lines, strict=True):
        if not isinstance(row, dict):
            problem = f"a row is an object, this is {type_name(row)}"
            raise DataError(f"{key}.path: {name}:{line}: {problem}")
    return Rows.of_lines(rows, name, lines)


def read_csv(name: str, key: str) -> Rows:
    text = _read_text(name, key)
    with _cells_of_any_size(text):
        return _parse_csv(text, name, key)


@contextmanager
def _cells_of_any_size(text: str) -> Iterator[None]:
    """Raise the csv module's limit on cells, 128 KiB for the whole process."""
    before = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parse_csv(text: str, name: str, key: str) -> Rows:
    declared = re.match(r"sep=(.)\r?\n", text)  # a first line of spreadsheet programs
    delimiter = declared[1] if declared else _delimiter(text)
    what = _DELIMITERS.get(delimiter, repr(delimiter))
    # newline="" leaves line ends inside quoted cells to the csv module.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    if declared:
        next(reader)
    header: list[str] | None = None
    rows, lines = [], []
    line = reader.line_num + 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not cells or cells == [""]:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header):
                    raise DataError(
                        f"{key}.path: {name}:{begin}: a column name occurs twice: {header}"
                    )
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{key}.path: {name}:{begin}: {len(cells)} cells where the header names "
                    f"{len(header)} columns; quote cells that hold {what}"
                )
            rows.append(dict(zip(header, cells, strict=True)))
            lines.append(begin)
    except csv.Error as error:
        raise DataError(
            f"{key}.path: {name}:{line}: not CSV ({error}); quote cells that hold {what}, quotes "
            "or line breaks, or use .jsonl"
        ) from error
    return Rows.of_lines(rows, name, lines)


def _delimiter(text: str) -> str:
    """Comma, semicolon (spreadsheets in countries with a decimal comma) or tab, whichever gives the
    header the most columns."""

    def n_columns(delimiter: str) -> int:
        reader = csv.reader(io.StringIO(text[:_HEADER], newline=""), delimiter=delimiter)
        try:
            return len(next((cells for cells in reader if any(cells)), []))
        except csv.Error:
            return 0

    return max(_DELIMITERS, key=n_columns)
