"""Secrets: what counts as one, and how to remove them from text.

A secret is the value of an environment variable with a telling name (WANDB_API_KEY, HF_TOKEN,
PGPASSWORD), the password in an address that a variable holds, or text with the shape of a secret
(`RL2.runtime.secret_shapes`).
"""

import json
import logging
import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from RL2.runtime.secret_shapes import PASSWORD, USER, without_shapes

HIDDEN = "***"

_WORDS = (
    r"(^|[_.])(keys?|credentials?|creds|pass|pat|dsn|cookie|auth|jwt)$",
    r"[^_.]_pwd$|_pw$",  # PWD is a folder
    r"(token|secrets?|pass_?w(or)?ds?|passphrase|api_?keys?)$",
    r"(access|api|auth|bearer|refresh|hub|judge)_tokens$",
    r"password|passwd|passphrase|secret_|private_?key|access_?key$|authorization",
    r"(api_?key|token|secret)_?\d+$|(^|_)bearer$|auth_header$|(db|user|root|admin|bind)_?pass$",
    r"(api_?key|_token|_secret)_(read|write|ro|rw|dev|test|prod|staging)$|bindpw$",
    r"webhook(_?url)?$|connection_?string$|database_?url$",
)
_NAME = re.compile("|".join(_WORDS), re.I)
# Tokens of a language model, not secrets.
_NO_SECRET = re.compile(
    r"(^|[_.])(pad|eos|bos|unk|cls|sep|mask|stop|end|start|image|special)_token$"
)
_SHORTEST = 8  # characters; hiding values such as "1" or "true" would blank out half of a log
_LIST = re.compile(r"[,;\s]+")
_PASSWORD = re.compile(rf"://{USER}:({PASSWORD})@")
_URLSAFE = str.maketrans("+/", "-_")
# Characters that a terminal would act on, without tab and newline. Marks that change the direction
# of text can disguise a line.
_DIRECTIONS = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if n not in (9, 10)}
_CONTROLS |= {n: f"\\u{n:04x}" for n in (0x2028, 0x2029, *_DIRECTIONS)}


@lru_cache(10_000)  # called for every variable and every line that is written
def is_secret_name(name: str) -> bool:
    """Whether a variable, key or flag of this name holds a secret."""
    name = name.replace("-", "_").lower().strip("_")
    return _NAME.search(name) is not None and _NO_SECRET.search(name) is None


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with `***` in place of every secret.

    environment: more variables whose secrets are hidden, besides those of this process.
    """
    return _without(text, _values(environment))


def redact_all(node: Any) -> Any:
    """Plain data (dicts, lists, scalars) with every string redacted.

    Use it before the data become JSON: escapes would hide a secret from us, but not from a reader.
    """
    return _redact_node(node, _values(), by_name=False)


def redact_config(node: Any) -> Any:
    """Like `redact_all`; also hides every value whose key is the name of a secret."""
    return _redact_node(node, _values(), by_name=True)


def for_terminal(text: str) -> str:
    """`text` without secrets, with control characters escaped."""
    return redact(text).translate(_CONTROLS)


def readable(text: str) -> str:
    """`text` on one line, with all characters escaped that are not printable."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RedactingFormatter(logging.Formatter):
    """Passes log lines and tracebacks through `for_terminal`."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def _redact_node(node: Any, values: tuple[str, ...], by_name: bool) -> Any:
    if isinstance(node, dict):
        return {
            _redact_node(name, values, by_name): HIDDEN
            if by_name and isinstance(value, str) and is_secret_name(str(name))
            else _redact_node(value, values, by_name)
            for name, value in node.items()
        }
    if isinstance(node, (list, tuple)):
        return [_redact_node(value, values, by_name) for value in node]
    return _without(node, values) if isinstance(node, str) else node


def _without(text: str, values: tuple[str, ...]) -> str:
    for value in values:
        if value in text:
            text = text.replace(value, HIDDEN)
    return without_shapes(text, HIDDEN)


def _values(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The secrets in variables, longest first, as one may be a part of another."""
    variables = [*os.environ.items(), *(environment or {}).items()]
    held = {
        value
        for name, value in variables
        if len(value) >= _SHORTEST and (is_secret_name(name) or "://" in value and "@" in value)
        for value in _secrets_of(value, is_secret_name(name), name.lower().endswith("s"))
    }
    return _forms(frozenset(held))


def _secrets_of(value: str, named: bool, several: bool) -> Iterator[str]:
    """The variable's value, its lines and list items, and the password in an address."""
    yield from _PASSWORD.findall(value)
    if named:
        yield value
        yield from value.splitlines()
        if several:
            yield from _LIST.split(value)


@lru_cache(16)
def _forms(values: frozenset[str]) -> tuple[str, ...]:
    """Each value as it is, and as it is written in JSON, Python, URLs and headers."""
    forms = {form for value in values for form in _forms_of(value)}
    return tuple(sorted((f for f in forms if len(f) >= _SHORTEST), key=len, reverse=True))


def _forms_of(value: str) -> Iterator[str]:
    data = value.encode(errors="surrogateescape")
    yield from (value, value.strip(), unquote(value), repr(value)[1:-1], data.hex())
    for ascii_only in (True, False):
        written = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        yield from (written, json.dumps(written, ensure_ascii=ascii_only)[1:-1])  # JSON in JSON
    for safe in ("", "/"):
        quoted = quote(data, safe=safe)
        yield from (quoted, quoted.replace("%20", "+"), re.sub("%..", _lower, quoted))
    for n_before in range(3):  # inside a longer text that is encoded, such as user:password
        encoded = b64encode(bytes(n_before) + data).decode()
        whole = encoded[(8 * n_before + 5) // 6 : 8 * (n_before + len(data)) // 6]
        yield from (whole, whole.translate(_URLSAFE))


def _lower(found: re.Match[str]) -> str:
    return found[0].lower()
