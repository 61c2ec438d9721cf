"""From `train_data.path` to rows, each of which knows the file and line that it came from.

The text formats are parsed here and not by a data-frame library for two reasons: an error can then
name the physical line, and rows keep the types that they were written with (one column type for all
rows would turn `extra_info` of differing shapes into nulls).
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from RL2.config.errors import DataError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_SYNTAX = f"a file ({' '.join(EXTENSIONS)}), split@file, or split@name:config of a hub data set"
# A split name with an optional slice, several of them joined by "+": train, train[:100], a[1:]+b.
_SPLIT = re.compile(r"\w+(\[[^\]@]*\])?(\+\w+(\[[^\]@]*\])?)*")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of the Arrow IPC format
_HUB_TIMEOUT = 5.0  # seconds for the one request that finds out whether the hub answers


@dataclass(frozen=True)
class Rows:
    """Rows of a data set and where each stands.

    Attributes:
        rows: one dict per row.
        source: file name or hub name, for messages.
        numbers: for each row the physical line on which it begins, or its place among the rows
            where there are no lines (parquet, arrow, hub); both from 1.
        unit: what `numbers` count, `line` or `row`.
    """

    rows: list[dict[str, Any]]
    source: str
    numbers: list[int]
    unit: str = "line"

    @classmethod
    def without_lines(cls, rows: list[dict[str, Any]], source: str) -> Rows:
        """Rows of a source that has no lines."""
        return cls(rows, source, list(range(1, len(rows) + 1)), "row")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def where(self, index: int) -> str:
        """`file:line`, or `file: row n` where the format has no lines."""
        separator = ":" if self.unit == "line" else ": row "
        return f"{self.source}{separator}{self.numbers[index]}"

    def fingerprint(self, indices: Iterable[int]) -> str:
        """SHA-256 over the content of these rows, wherever they were read from. What JSON does not
        have (a date, an image) counts by its type alone."""
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
            self.source,
            [self.numbers[i] for i in indices],
            self.unit,
        )


def load_rows(path: str, key: str) -> Rows:
    """Read the rows that `{key}.path` names.

    Args:
        path: a json, jsonl, csv, parquet or arrow file; `split@file`; or `split@name:config` for a
            data set of the Hugging Face hub. `split` may be a slice (`train[:100]`,
            `train[10%:20%]`). A file that exists under the literal name wins, so names that contain
            `@` or `:` work.
        key: config group (`train_data`, `test_data`, `data`), for messages.

    Raises:
        DataError: nothing there, nothing in it, or not readable; names key, file and line.
    """
    path = os.path.expanduser(str(path))
    split, name = _split_path(path)
    if os.path.isfile(name):
        rows = _slice(_read_file(name, key), split, path, key)
    elif _looks_local(name, split):
        hint = "is a folder, not a file" if os.path.isdir(name) else "does not exist"
        raise DataError(f"{key}.path={path}: {name} {hint}; give {_SYNTAX}")
    else:
        rows = _read_hub(name, split, key)
    if len(rows) == 0:
        raise DataError(f"{key}.path={path}: the data set is empty; give one with at least one row")
    return rows


# ------------------------------------------------------------------------------ path syntax


def _split_path(path: str) -> tuple[str | None, str]:
    if os.path.isfile(path):
        return None, path
    split, at, name = path.partition("@")
    if at and _SPLIT.fullmatch(split):
        return split, os.path.expanduser(name)
    return None, path


def _looks_local(name: str, split: str | None) -> bool:
    """Whether a name that is no existing file was meant as one (a hub name is `owner/name`)."""
    if split is None or not name:
        return True
    if os.path.isdir(name.partition(":")[0]):
        return False  # load_dataset takes a folder of data files as it takes a hub name
    if name.startswith((".", "/", "~")) or os.path.splitext(name)[1].lower() in EXTENSIONS:
        return True
    return name.partition(":")[0].count("/") > 1 or "\\" in name


def _slice(rows: Rows, split: str | None, path: str, key: str) -> Rows:
    """A file holds one split, whatever its name; only the slice matters."""
    if split is None or "[" not in split and "+" not in split:
        return rows
    from datasets import ReadInstruction  # here: it costs a second, and most paths have no slice

    names = re.findall(r"(?:^|\+)(\w+)", split)
    try:
        spans = ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(names, len(rows)))
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{key}.path={path}: cannot read the slice {split!r} ({_one_line(error)}); "
            "write for example train[:100] or train[10%:20%]"
        ) from error
    return rows.select((span.from_, max(span.from_, span.to)) for span in spans)


# ------------------------------------------------------------------------------ files


def _read_file(name: str, key: str) -> Rows:
    extension = os.path.splitext(name)[1].lower()
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
    }
    if extension not in readers:
        raise DataError(
            f"{key}.path={name}: unknown extension {extension!r}; use one of {' '.join(EXTENSIONS)}"
        )
    try:
        return readers[extension](name, key)
    except OSError as error:
        reason = error.strerror or _one_line(error)
        raise DataError(
            f"{key}.path={name}: cannot be read: {reason}; check that the file is whole "
            "and that you may read it"
        ) from error


def _read_text(name: str, key: str) -> str:
    with open(name, "rb") as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark the codec counts from behind it.
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, start) + 1
        column = start - data.rfind(b"\n", 0, start)
        raise DataError(
            f"{key}.path: {name}:{line}:{column}: byte 0x{data[start]:02x} at offset {start} "
            "is not UTF-8; save the file as UTF-8"
        ) from error


def _read_jsonl(name: str, key: str) -> Rows:
    return _parse_jsonl(_read_text(name, key), name, key)


def _parse_jsonl(text: str, name: str, key: str) -> Rows:
    rows, lines = [], []
    # Not splitlines(): JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_no_key_twice)
        except (ValueError, RecursionError) as error:
            decoding = isinstance(error, json.JSONDecodeError)
            column = f":{len(line[: error.pos].encode()) + 1}" if decoding else ""
            reason = error.msg if decoding else _one_line(error)
            raise DataError(
                f"{key}.path: {name}:{number}{column}: not JSON ({reason}); "
                "each line holds one object, for example "
                '{"question": "...", "answer": "... #### 42"}'
            ) from error
        rows.append(_require_object(row, f"{name}:{number}", key))
        lines.append(number)
    return Rows(rows, name, lines)


def _read_json(name: str, key: str) -> Rows:
    """A list of objects; objects one after another (JSON lines in a .json file) are read as well.

    Elements are decoded one by one, because only so their positions are known.
    """
    text = _read_text(name, key)
    start = _skip(text, 0)
    if text[start : start + 1] != "[":
        return _parse_jsonl_or_object(text, name, key)
    decoder = json.JSONDecoder(object_pairs_hook=_no_key_twice)
    rows, lines = [], []
    line, counted = 1, 0
    position = _skip(text, start + 1)
    if text[position : position + 1] == "]":
        _require_end(text, position + 1, name, key)
        return Rows([], name, [])
    while True:
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            reason = error.msg if isinstance(error, json.JSONDecodeError) else _one_line(error)
            raise _json_error(text, at, reason, name, key) from error
        rows.append(_require_object(row, f"{name}:{line}", key))
        lines.append(line)
        position = _skip(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            _require_end(text, position + 1, name, key)
            return Rows(rows, name, lines)
        if mark != ",":
            raise _json_error(text, position, "expected ',' or ']'", name, key)
        position = _skip(text, position + 1)


def _parse_jsonl_or_object(text: str, name: str, key: str) -> Rows:
    try:
        whole = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError):
        return _parse_jsonl(text, name, key)
    if isinstance(whole, list):  # only the empty file comes here
        return Rows([], name, [])
    if isinstance(whole, dict) and "\n" not in text.strip():
        return _parse_jsonl(text, name, key)
    found = f"an object with keys {sorted(whole)[:8]}" if isinstance(whole, dict) else repr(whole)
    raise DataError(
        f"{key}.path: {name}: the top level is {found[:120]}; a .json file holds a list of rows "
        "(or one row a line, as .jsonl does)"
    )


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _require_end(text: str, position: int, name: str, key: str) -> None:
    position = _skip(text, position)
    if position != len(text):
        raise _json_error(text, position, "text after the closing ']'", name, key)


def _json_error(text: str, position: int, reason: str, name: str, key: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = len(text[text.rfind("\n", 0, position) + 1 : position].encode()) + 1  # bytes
    return DataError(
        f"{key}.path: {name}:{line}:{column}: not JSON ({reason}); the file holds one list of "
        "objects"
    )


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; json would keep the last of two in silence."""
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in row if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return row


def _require_object(row: Any, where: str, key: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise DataError(f"{key}.path: {where}: a row is an object, this is {type_name(row)}")


def _read_csv(name: str, key: str) -> Rows:
    # newline="" leaves line ends inside quoted cells to the csv module.
    reader = csv.reader(io.StringIO(_read_text(name, key), newline=""), strict=True)
    header: list[str] | None = None
    rows, lines = [], []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{key}.path: {name}:{line}: not CSV ({error}); quote cells that hold commas, "
                "quotes or line breaks, or use .jsonl"
            ) from error
        if cells is None:
            return Rows(rows, name, lines)
        begin, line = line, reader.line_num + 1
        if not cells or cells == [""]:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) != len(header):
                raise DataError(f"{key}.path: {name}:{begin}: a column name occurs twice: {header}")
        elif len(cells) != len(header):
            raise DataError(
                f"{key}.path: {name}:{begin}: {len(cells)} cells where the header names "
                f"{len(header)} columns; quote cells that hold commas"
            )
        else:
            rows.append(dict(zip(header, cells, strict=True)))
            lines.append(begin)


def _read_parquet(name: str, key: str) -> Rows:
    try:
        # Not read_table(): it would make columns of folder names such as `run=3`.
        with open(name, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file).read()
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{key}.path: {name}: not a parquet file ({_one_line(error)}); write it again"
        ) from error
    return _rows_of_table(table, name, key)


def _read_arrow(name: str, key: str) -> Rows:
    """Both kinds of Arrow file: the stream that `datasets` writes, and the IPC (feather) file."""
    try:
        with pyarrow.OSFile(name) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            table = opened(file).read_all()
            if not is_file:  # a stream may end anywhere between two batches, and looks whole
                file.seek(file.size() - len(_END_OF_STREAM))
                if file.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
                    raise pyarrow.ArrowInvalid("it ends without the end mark: it was cut off")
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{key}.path: {name}: not an arrow file ({_one_line(error)}); write it again"
        ) from error
    return _rows_of_table(table, name, key)


def _rows_of_table(table: pyarrow.Table, name: str, key: str) -> Rows:
    twice = {column for column in table.column_names if table.column_names.count(column) > 1}
    if twice:
        raise DataError(
            f"{key}.path: {name}: the column {min(twice)} occurs twice; rename or drop one"
        )
    try:
        table.validate(full=True)
        return Rows.without_lines(table.to_pylist(), name)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        # Bytes that are no UTF-8, dates that Python cannot hold.
        raise DataError(
            f"{key}.path: {name}: its values cannot be read ({_one_line(error)}); write it again "
            "with text in UTF-8"
        ) from error


# ------------------------------------------------------------------------------ hub


def _read_hub(name: str, split: str, key: str) -> Rows:
    """`split@name:config` by `datasets.load_dataset`; a copy in its cache works offline."""
    # Imported here: only this path needs them, and they cost a second.
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    repository, _, config = name.partition(":")
    source = f"{split}@{name}"
    if not os.path.isdir(repository):
        # One short request first: load_dataset itself retries an absent network for 20 s and more.
        try:
            HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT)
        except RepositoryNotFoundError as error:
            raise DataError(
                f"{key}.path={source}: the hub has no data set {repository!r} that you may read "
                "(nor is there a file of that name); check the name, or log in with `hf auth login`"
            ) from error
        except Exception as error:
            # Network, proxy, offline mode, server trouble, malformed name: many unrelated classes.
            cached = os.path.join(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___"))
            if not os.path.isdir(cached):
                raise DataError(
                    f"{key}.path={source}: cannot reach the Hugging Face hub for data set "
                    f"{repository!r} ({type(error).__name__}: {_one_line(error)}), no copy is "
                    f"cached, and no such file exists; offline, give a local file: "
                    f"{key}.path=FILE.jsonl"
                ) from error
    try:
        table = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:
        # load_dataset raises ValueError, FileNotFoundError, ConnectionError, DatasetGenerationError
        # and whatever the parser of the remote files raises.
        raise DataError(
            f"{key}.path={source}: data set {repository!r} does not load: {_one_line(error)}; "
            "check name, config and split"
        ) from error
    return Rows.without_lines(table.to_list(), source)


# ------------------------------------------------------------------------------ words


def type_name(value: Any) -> str:
    """What a value is, in the words of a data file."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "infinite"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:240] + "..."
