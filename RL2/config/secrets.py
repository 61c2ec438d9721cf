"""Secrets: what counts as one, and text without them.

A secret is the value of an environment variable that is named like one (WANDB_API_KEY, HF_TOKEN,
RL2_SERVER_KEY), a password in an address, or what has the form of a common token.
"""

import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

HIDDEN = "***"

_NAME = re.compile(r"(^|[_\-.])(api_?key|key|token|secret|password|passwd|credentials?)$", re.I)
_SHORTEST = 8  # characters; a variable that says "1" or "true" would blank out half of a log
_TOKEN = re.compile(r"\b(hf_\w{16,}|sk-[\w\-]{16,}|gh[pousr]_\w{16,}|wandb_v1_\w{16,})")
_USERINFO = re.compile(r"(?<=://)[^/\s@\"']+(?=@)")


@cache  # asked about every variable for every line that is written
def is_secret_name(name: str) -> bool:
    """Whether a variable, key or flag of this name holds a secret."""
    return _NAME.search(name.replace("-", "_")) is not None


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with `***` for every secret.

    environment: variables whose secrets are meant beside those of this process.
    """
    variables = [*os.environ.items(), *(environment or {}).items()]
    values = {
        value for name, value in variables if len(value) >= _SHORTEST and is_secret_name(name)
    }
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, _USERINFO.sub(HIDDEN, text))


def redact_config(node: Any) -> Any:
    """A plain config (dicts, lists, scalars) with every text redacted, and whole what stands under
    the name of a secret."""
    if isinstance(node, dict):
        return {
            name: HIDDEN
            if isinstance(value, str) and is_secret_name(str(name))
            else redact_config(value)
            for name, value in node.items()
        }
    if isinstance(node, list):
        return [redact_config(value) for value in node]
    return redact(node) if isinstance(node, str) else node


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks among them, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
