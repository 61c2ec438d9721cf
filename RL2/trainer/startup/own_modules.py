"""The files of user code: a Python file, and the modules that it imports."""

import ast
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from RL2.environments.modules import installed


def with_imports(file: Path) -> dict[str, bytes]:
    """The text of a Python file, under an empty name, and those of all modules that it imports,
    directly or not, by name. Installed packages are left out: their versions tell enough.

    The files are read, not run. So late imports are found, but not names made up at run time.
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
        return  # not Python; importing it reports that
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parts = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _specs(name: str, folder: Path) -> Iterator[ModuleSpec]:
    """The specs of a module and of the packages around it, unless they are installed.

    folder: an additional place to search, as many files add their own folder to `sys.path`.
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
