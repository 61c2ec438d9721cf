"""Parquet and Arrow files."""

from __future__ import annotations

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from RL2.datasets.rows import Rows, without_nested_nulls
from RL2.runtime.errors import DataError, one_line

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of the Arrow IPC format


def read_parquet(name: str, key: str) -> Rows:
    try:
        # Not read_table(): it would turn folder names such as `run=3` into columns.
        with open(name, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file).read()
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{key}.path: {name}: not a parquet file ({one_line(error)}); write it again"
        ) from error
    return _rows_of_table(table, name, key)


def read_arrow(name: str, key: str) -> Rows:
    """Both kinds of Arrow file: the stream that `datasets` writes, and the IPC (feather) file."""
    try:
        with pyarrow.OSFile(name) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            table = opened(file).read_all()
            if not is_file:  # a stream that is cut off between two batches looks complete
                file.seek(file.size() - len(_END_OF_STREAM))
                if file.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
                    raise pyarrow.ArrowInvalid("it ends without the end mark: it was cut off")
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{key}.path: {name}: not an arrow file ({one_line(error)}); write it again"
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
        rows = table.to_pylist(maps_as_pydicts="strict")
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
        # Bytes that are not UTF-8, dates that Python cannot hold.
        raise DataError(
            f"{key}.path: {name}: its values cannot be read ({one_line(error)}); write it again "
            "with text in UTF-8"
        ) from error
    return Rows.without_lines(without_nested_nulls(rows), name)
