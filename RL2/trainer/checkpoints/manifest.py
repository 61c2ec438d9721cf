"""What a finished folder holds, written last, so that later damage is noticed before anything is
loaded.

Neither `torch.distributed.checkpoint` nor `torch.save` notices a flipped byte in a tensor. The
manifest has the size and the SHA-256 of every file, and a SHA-256 of itself. It finds accidents,
not attacks: anyone who can write the folder can also write a manifest that fits.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "manifest.json"

Files = dict[str, dict[str, Any]]  # by name: "bytes" and "sha256"


class Damaged(Exception):
    """A folder is not what its manifest says; the message names the first thing that differs.

    What cannot be read now (no permission, no network) is not damaged: it raises OSError.
    """


def fingerprints(paths: Iterable[Path], folder: Path) -> Files:
    """Sizes and SHA-256 of files, by their names relative to `folder`."""
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in paths
    }


def write(folder: Path, files: Files, about: dict[str, Any]) -> None:
    """Write the manifest of a folder that is otherwise finished; the caller makes it durable.

    about: what a reader may want to know about the run, as plain JSON values.
    """
    content = {"about": about, "files": dict(sorted(files.items()))}
    content["sha256"] = digest(content)
    (folder / NAME).write_text(json.dumps(content, indent=1))


def read(folder: Path, required: Iterable[str] = ()) -> dict[str, Any]:
    """The manifest of a folder whose files have the names and sizes that it lists.

    Args:
        required: names of files that must be there.

    Raises:
        Damaged: there is none, it is not whole, or names or sizes differ.
        OSError: something cannot be read, so its state is unknown.
    """
    found = _sizes(folder)
    if found.pop(NAME, None) is None:
        raise Damaged(f"it has no {NAME}")
    text = (folder / NAME).read_bytes()
    try:
        content = json.loads(text)
        expected_digest, files = content.pop("sha256"), content["files"]
        expected = {name: entry["bytes"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{NAME} is not readable") from error
    if expected_digest != digest(content):
        raise Damaged(f"{NAME} was changed")
    if missing := sorted({*expected, *required} - found.keys()):
        raise Damaged(f"{missing[0]} is missing")
    if more := sorted(found.keys() - expected):
        raise Damaged(f"{more[0]} is not in its {NAME}")
    for name, size in expected.items():
        if found[name] != size:
            raise Damaged(f"{name} has {found[name]} bytes, not {size}")
    return content


def verify(folder: Path, content: dict[str, Any], part: slice = slice(None)) -> None:
    """Compare the files of a folder with what `read` returned.

    part: which of them, in the order of their names, so that ranks can share the work.

    Raises:
        Damaged: a file's SHA-256 differs.
        OSError: one cannot be read.
    """
    for name in sorted(content["files"])[part]:
        if _sha256(folder / name) != content["files"][name]["sha256"]:
            raise Damaged(f"{name} is damaged: its SHA-256 is not that of {NAME}")


def _sizes(folder: Path) -> dict[str, int]:
    """The sizes of all files below a folder, by name. `Path.rglob` skips unreadable folders."""
    os.listdir(folder)  # os.walk accepts a link to nothing
    found = {}
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def _raise(error: OSError) -> None:
    raise error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """The SHA-256 of JSON values, such as what `read` returns."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
