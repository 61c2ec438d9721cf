"""From `train_data.path` to rows."""

from __future__ import annotations

import os
import re

from RL2.config.data_paths import extension_of, find_data
from RL2.config.models import HUB_TIMEOUT
from RL2.config.paths import expand_home
from RL2.datasets.rows import Rows, without_nested_nulls
from RL2.datasets.table_files import read_arrow, read_parquet
from RL2.datasets.text_files import read_csv, read_json, read_jsonl
from RL2.runtime.errors import DataError, one_line


def load_rows(path: str, key: str) -> Rows:
    """Read the rows that `{key}.path` names.

    Args:
        path: a json, jsonl, csv, tsv, parquet or arrow file (text files may be gzipped); a folder
            of such files or a pattern (`data/*.jsonl`), read in the order of their names; `split@`
            before one of these; or `split@name:config` for a data set on the Hugging Face hub.
            `split` may be a slice (`train[:100]`, `train[10%:20%]`); in a folder it selects files
            by their names. An existing file of the literal name takes precedence, so names that
            contain `@` or `:` work.
        key: config group (`train_data`, `test_data`, `data`), for messages.

    Raises:
        ConfigError: the path cannot name any rows.
        DataError: the data is missing, empty or not readable; names key, file and line.
    """
    path = expand_home(str(path), f"{key}.path")
    found = find_data(key, path)
    if found.files:
        rows = Rows.joined(_read_file(file, key) for file in found.files)
        rows = _slice(rows, found.split, path, key)
    else:
        rows = _read_hub(found.name, found.split, key)
    if len(rows) == 0:
        raise DataError(f"{key}.path={path}: the data set is empty; give one with at least one row")
    return rows


def _slice(rows: Rows, split: str | None, path: str, key: str) -> Rows:
    """A file holds one split, whatever its name; only the slice matters."""
    if split is None or "[" not in split and "+" not in split:
        return rows
    from datasets import ReadInstruction  # here, as it takes a second and most paths have no slice

    names = re.findall(r"(?:^|\+)(\w+)", split)
    try:
        spans = ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(names, len(rows)))
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{key}.path={path}: cannot read the slice {split!r} ({one_line(error)}); "
            "write for example train[:100] or train[10%:20%]"
        ) from error
    return rows.select((span.from_, max(span.from_, span.to)) for span in spans)


# ------------------------------------------------------------------------------ files


_READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def _read_file(name: str, key: str) -> Rows:
    try:
        return _READERS[extension_of(name).removesuffix(".gz")](name, key)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(
            f"{key}.path={name}: cannot be read: {reason}; check that the file is complete "
            "and that you may read it"
        ) from error


# ------------------------------------------------------------------------------ hub


def _read_hub(name: str, split: str, key: str) -> Rows:
    """`split@name:config` by `datasets.load_dataset`; a copy in its cache works offline."""
    # Imported here, as only this path needs them and they take a second.
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    repository, _, config = name.partition(":")
    source = f"{split}@{name}"
    if not os.path.isdir(repository):
        # One short request first: without a network, load_dataset retries for 20 s or more.
        try:
            HfApi().dataset_info(repository, timeout=HUB_TIMEOUT)
        except RepositoryNotFoundError as error:
            raise DataError(
                f"{key}.path={source}: the hub has no data set {repository!r} that you may read "
                "(nor is there a file of that name); check the name, or log in with `hf auth login`"
            ) from error
        except Exception as error:
            # Network, proxy, offline mode, server error, malformed name: many unrelated classes.
            cached = os.path.join(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___"))
            if not os.path.isdir(cached):
                raise DataError(
                    f"{key}.path={source}: cannot reach the Hugging Face hub for data set "
                    f"{repository!r} ({type(error).__name__}: {one_line(error)}), no copy is "
                    f"cached, and no such file exists; offline, give a local file: "
                    f"{key}.path=FILE.jsonl"
                ) from error
    try:
        table = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:
        # load_dataset raises ValueError, FileNotFoundError, ConnectionError, DatasetGenerationError
        # and all errors of the remote files' parser.
        raise DataError(
            f"{key}.path={source}: data set {repository!r} does not load: {one_line(error)}; "
            "check name, config and split"
        ) from error
    return Rows.without_lines(without_nested_nulls(table.to_list()), source)
