"""Checks of an environment's source, before a model loads.

The source is only read: a call of `step` might cost money, or change something.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator

from RL2.environments.calls import GIVES, NEEDED, SEVERAL


def fault_of_returns(source: bytes) -> str | None:
    """What is wrong with a literal answer of `step`, such as `return 1.0` or a dict without a
    required key; None if nothing is found.

    A decorated `step` is not checked, as the decorator may change the answer.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None  # reported by the import
    makes = [node for node in tree.body if "step" in _names(node)]
    if len(makes) != 1 or not isinstance(makes[0], ast.AsyncFunctionDef):
        return None
    if makes[0].decorator_list:
        return None
    returns = list(_returns(makes[0]))
    if not all(map(_is_none, returns)):  # otherwise some samples are dropped on purpose
        returns = [found for found in returns if not _is_none(found)]
    for found in returns:
        if (fault := _fault(found.value)) is not None:
            return f"step returns {fault} in line {found.lineno}"
    return None


def hints(keys: Iterable[str], known: Iterable[str] = GIVES) -> str:
    """Unknown keys of an answer, each with the closest known one."""
    said = []
    for key in keys:
        close = difflib.get_close_matches(key.strip("'\""), list(known), n=1)
        said.append(f"{key} (did you mean {close[0]}?)" if close else key)
    return ", ".join(said)


def _names(node: ast.stmt) -> set[str]:
    """Names that a module-level statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    return {
        one.id
        for one in ast.walk(node)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
    } | {
        alias.asname or alias.name
        for one in ast.walk(node)
        if isinstance(one, (ast.Import, ast.ImportFrom))
        for alias in one.names
    }


def _returns(node: ast.AST) -> Iterator[ast.Return]:
    """The return statements of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _returns(child)


def _is_none(found: ast.Return) -> bool:
    return found.value is None or getattr(found.value, "value", ...) is None


_KINDS = {ast.Tuple: "a tuple", ast.List: "a list", ast.Set: "a set", ast.JoinedStr: "a string"}


def _fault(value: ast.expr | None) -> str | None:
    needed = ", ".join(NEEDED)
    if value is None or isinstance(value, ast.Constant):
        return f"{getattr(value, 'value', None)!r:.80}, not a dict with {needed}"
    if type(value) in _KINDS:
        return f"{_KINDS[type(value)]}, not a dict with {needed}"
    if not isinstance(value, ast.Dict):
        return None
    if not all(isinstance(key, ast.Constant) for key in value.keys):  # None: `**other`
        return None
    keys = [key.value for key in value.keys]
    of_key = dict(zip(keys, value.values, strict=True))
    several = SEVERAL in keys and not isinstance(of_key[SEVERAL], ast.Constant)
    missing = [key for key in NEEDED[several:] if key not in keys]
    if not missing:
        return None
    unknown = [repr(key)[:80] for key in keys if key not in GIVES]
    has = f"; unknown: {hints(unknown, missing)}" if unknown else ""
    return f"a dict that lacks {', '.join(missing)}{has}"
