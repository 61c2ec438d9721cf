"""What `train_data.path` names: the syntax, and the files behind it. Nothing is read here.

All errors about paths that name no rows come from here: it checks configs before a run, and gives
readers their files. (`datasets` also finds the splits of a folder, but its import takes a second,
and it counts a file that names no split as part of train.)

rows.jsonl   train@rows.jsonl   train[:100]@rows.jsonl        a file
shards/      train@shards/      train@shards/*.jsonl          many files, read as one
train@openai/gsm8k:main                                       a data set on the hub
"""

import os
import re
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from RL2.config.models import HUB_NAME
from RL2.config.paths import not_there
from RL2.runtime.errors import ConfigError

TEXT_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv")  # each may be gzipped: .jsonl.gz
EXTENSIONS = (*TEXT_EXTENSIONS, ".parquet", ".arrow")
FILES = f"{', '.join(EXTENSIONS)}, text ones also with .gz"
"""The types of data files, in words."""

# A split name with an optional slice, several of them joined by "+": train, train[:100], a[1:]+b.
_SPLIT = re.compile(r"\w+(\[[^\]@]*\])?(\+\w+(\[[^\]@]*\])?)*")
_HUB_DATA = re.compile(rf"({HUB_NAME}/)?{HUB_NAME}(:[^:/]+)?")

# Words in the names of files that tell their split, as on the hub.
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SHARD = re.compile(r"[-_.]\d+([-_]of[-_]\d+)?([-_][0-9a-f]+)?$")  # what follows a split's name
# Files that describe the others: the hub's, and those of `datasets` and of models.
_ABOUT = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}
_CARD = re.compile(r"\A---\n.*?^(configs|dataset_info):.*?^---$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class DataPath:
    """The split, name and files that a path means.

    files: the files in reading order; empty if `datasets` is to load `split@name`.
    """

    split: str | None
    name: str
    files: list[str]


def find_data(group: str, path: str, name: str = "path") -> DataPath:
    """The files that `{group}.{name}` names; the hub is not queried.

    Raises:
        ConfigError: the path cannot name any rows.
    """
    of_key = f"{group}.{name}"
    key = f"{of_key}={path}"
    try:
        split, name = split_data_path(path)
        if is_described(name):
            if split is None:
                raise ConfigError(f"{key}: is a folder of several splits; say which: train@{path}")
            return DataPath(split, name, [])
        files = data_files(split, name, key)
    except OSError as error:  # a folder that may not be read
        raise ConfigError(
            f"{key}: cannot be accessed ({error.strerror}); give a file or folder that can be read"
        ) from error
    for file in files:
        if not os.path.isfile(file):
            raise ConfigError(f"{key}: is a pipe or a device; write the rows to a file")
        if not is_data_file(file):
            raise ConfigError(f"{key}: {file} has an unknown file type; use {FILES}")
    if files:
        if not any(os.path.getsize(file) for file in files):
            raise ConfigError(f"{key}: the file is empty; give one with rows")
    elif is_data_file(name) or name.startswith((".", os.sep)) or has_magic(name):
        raise ConfigError(f"{key}: {not_there(name)}; give an existing file")
    elif not is_hub_name(split, name):
        raise ConfigError(
            f"{key}: neither a file or folder ({FILES}) nor split@name:config such as "
            f"train@openai/gsm8k:main{_with_split(of_key, path)}"
        )
    return DataPath(split, name, files)


def split_data_path(path: str) -> tuple[str | None, str]:
    """Split and name of `split@name`; no split if the whole text names an existing file or folder,
    or if the text before the first `@` cannot be a split."""
    split, at, name = path.partition("@")
    if not at or not _SPLIT.fullmatch(split) or os.path.exists(path) or glob(path):
        return None, path
    return split, name


def extension_of(name: str) -> str:
    """The extension in lower case; both parts of `.jsonl.gz`."""
    stem, extension = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + extension if extension == ".gz" else extension


def is_data_file(name: str) -> bool:
    """Whether a file of this name can be read as rows."""
    extension = extension_of(name)
    return extension in EXTENSIONS or extension.removesuffix(".gz") in TEXT_EXTENSIONS


def is_hub_name(split: str | None, name: str) -> bool:
    """Whether `split@name`, by its form, can only be a data set on the hub."""
    return split is not None and not is_data_file(name) and bool(_HUB_DATA.fullmatch(name))


def is_described(name: str) -> bool:
    """Whether `name` is a local copy of a data set on the hub that lists the files of each config
    itself (`folder:config`, or a README.md that lists configs)."""
    folder, _, config = name.partition(":")
    if os.path.isdir(name):
        card = Path(name, "README.md")
        return card.is_file() and bool(_CARD.match(card.read_text(errors="replace")))
    return bool(config) and os.path.isdir(folder)


def data_files(split: str | None, name: str, key: str) -> list[str]:
    """The files that a local name means, in reading order.

    Args:
        split: the split from `split_data_path`, which selects files of a folder.
        name: a file, a folder, or a pattern (`*`, `?`, `[…]`, `**` for folders in folders).
        key: `train_data.path=…`, for messages.

    Returns:
        [] if nothing has that name.

    Raises:
        ConfigError: a folder for which it is not clear which files are meant.
    """
    if os.path.isdir(name):
        return _files_of_folder(split, name, key)
    if os.path.exists(name) or not has_magic(name):
        return [name] if os.path.exists(name) else []
    return sorted(file for file in glob(name, recursive=True) if os.path.isfile(file))


def _files_of_folder(split: str | None, folder: str, key: str) -> list[str]:
    root = Path(folder)
    files = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        if is_data_file(path.name)
        and path.name not in _ABOUT
        and path.is_file()
        # Not the files that programs keep for themselves: .cache, __MACOSX, caches of `datasets`.
        and not any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
        and not re.fullmatch(r"(cache|tmp).*\.arrow", path.name)
    )
    if not files:
        raise ConfigError(
            f"{key}: {folder} is a folder, not a file, and holds no data files ({FILES}); give one "
            "that does"
        )
    names = sorted({_SPLIT_WORDS[word] for file in files for word in _words(file)})
    if split is not None:
        wanted, *others = {name.lower() for name in re.findall(r"(?:^|\+)(\w+)", split)}
        if others:
            raise ConfigError(
                f"{key}: give only one split of a folder, or a pattern, such as *.jsonl"
            )
        chosen = [file for file in files if wanted in _split_names(file)]
        chosen = chosen or [
            file for file in files
            if _SPLIT_WORDS.get(wanted) in {_SPLIT_WORDS[word] for word in _words(file)}
        ]  # fmt: skip
        if not chosen and names:
            raise ConfigError(
                f"{key}: no file in the folder is of the split {wanted}; by their names there are "
                f"{', '.join(names)}"
            )
        files = chosen or files  # a folder that names no split holds one, as a file does
    elif len(names) > 1:
        raise ConfigError(
            f"{key}: the folder holds the splits {', '.join(names)}; say which one: "
            f"{names[-1]}@{folder}"
        )
    kinds = sorted({extension_of(file.name) for file in files})
    if len(kinds) > 1:
        raise ConfigError(
            f"{key}: the folder holds {' and '.join(kinds)} files, maybe of the same rows; say "
            f"which are meant: {os.path.join(folder, f'*{kinds[0]}')}"
        )
    return [str(root / file) for file in files]


def _split_names(file: Path) -> set[str]:
    """The splits that this file may belong to: its folders' names, and its own without a number."""
    stem = file.name.lower().removesuffix(extension_of(file.name))
    return {part.lower() for part in file.parts[:-1]} | {stem, _SHARD.sub("", stem)}


def _words(file: Path) -> set[str]:
    """The words in a file's name and folders that tell a split."""
    return _SPLIT_WORDS.keys() & set(re.split(r"[^a-z]+", str(file).lower()))


def _with_split(key: str, path: str) -> str:
    """The advice for the name of a data set without its split."""
    if not _HUB_DATA.fullmatch(path):
        return ""
    split = "test" if "test" in key else "train"
    config = "" if ":" in path else "[:config]"
    return f"; a data set on the hub needs its split: {key}='{split}@{path}{config}'"
