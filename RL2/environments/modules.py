"""The user's modules that an environment imports: all of its processes get the same text.

Processes are also started during a run. A module that was edited since would change the rewards.
Standard library only.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Container, Sequence
from types import ModuleType
from typing import Any

# By module name: the file, its text (latin-1, so that JSON can hold any bytes), whether it is a
# package. A namespace package has no file and no text.
Modules = dict[str, tuple[str, str | None, bool]]


def imported_since(before: Container[str]) -> Modules:
    """The modules imported since `before` that do not belong to Python or an installed package."""
    found: Modules = {}
    for name, module in list(sys.modules.items()):
        if name in before or name == "__main__":
            continue
        spec = getattr(module, "__spec__", None)
        if spec is None or spec.name != name:
            continue
        places, file = spec.submodule_search_locations, spec.origin
        if places is not None and file is None:
            if not installed(next(iter(places), sys.prefix)):
                found[name] = ("", None, True)
        elif file is not None and file.endswith(".py") and not installed(file):
            try:
                with open(file, "rb") as opened:
                    found[name] = (file, opened.read().decode("latin-1"), places is not None)
            except OSError:
                pass  # not a real file, or removed
    return found


def installed(file: str) -> bool:
    """Whether a file belongs to the standard library or to an installed package."""
    file = os.path.realpath(file)
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(file.startswith(os.path.realpath(folder) + os.sep) for folder in folders if folder)


class Remembered(importlib.abc.MetaPathFinder):
    """Finds modules as `imported_since` has recorded them."""

    def __init__(self, modules: Modules):
        self._modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if name not in self._modules:
            return None
        file, text, is_package = self._modules[name]
        if text is None:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        folders = [os.path.dirname(file)] if is_package else None
        return importlib.util.spec_from_file_location(
            name, file, loader=_Loader(name, file, text.encode("latin-1")),
            submodule_search_locations=folders,
        )  # fmt: skip


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, file: str, text: bytes):
        super().__init__(name, file)
        self._text = text

    def get_code(self, fullname: str) -> Any:
        return compile(self._text, self.path, "exec", dont_inherit=True)
