"""The Python files that somebody's file consists of: itself, and modules of their own behind it."""

import ast
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from RL2.environments.modules import installed


def with_imports(file: Path) -> dict[str, bytes]:
    """The text of a Python file, under an empty name, and those of all modules that it imports, and
    they in turn, by name; not of installed packages, whose versions tell enough.

    The files are read, not run, so what is imported late is there, too; not what has a name that is
    made up at run time.
    """
    found = {"": file.read_bytes()}
    waiting = [("", "")]
    while waiting:
        name, package = waiting.pop()
        for imported in _imports(found[name], package):
            for spec in _specs(imported, file.parent):
                if spec.name not in found and spec.origin and spec.origin.endswith(".py"):
                    found[spec.name] = Path(spec.origin).read_bytes()
                    waiting.append((spec.name, spec.parent))
    return found


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Names that may be modules."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # no Python; whoever imports it says it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parts = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _specs(name: str, folder: Path) -> Iterator[ModuleSpec]:
    """Of a module and the packages around it, as far as they are somebody's own.

    folder: where it is looked for as well, as many a file adds its own to `sys.path`.
    """
    parts = name.split(".")
    places = [*sys.path, str(folder)]
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), places)
        if spec is None or parts[0] == "RL2" or _is_installed(spec):
            return
        yield spec
        places = spec.submodule_search_locations
        if places is None:
            return


def _is_installed(spec: ModuleSpec) -> bool:
    places = spec.submodule_search_locations
    where = spec.origin or next(iter(places or []), None)
    return where is None or installed(where)
