"""The errors that this library raises on purpose.

Every message is one line that names the key, the value and the way out, for example
`actor.tp_size=3: must divide world_size=8; use 1, 2, 4 or 8`.
"""

from __future__ import annotations

import traceback
from pathlib import Path


class RL2Error(Exception):
    """Base of all errors raised by this library."""


class ConfigError(RL2Error, ValueError):
    """A configuration value that cannot work, found before anything is built."""


class DataError(RL2Error, ValueError):
    """A data set or a row of it that cannot be used."""


class EnvError(RL2Error, RuntimeError):
    """An environment that failed."""


class EngineError(RL2Error, RuntimeError):
    """A rollout engine that failed."""


class CheckpointError(RL2Error, RuntimeError):
    """A checkpoint that cannot be written or loaded."""


class Interrupted(RL2Error):
    """The run was asked to stop while it was waiting; what it waited for is given up."""


class TrainingError(RL2Error, RuntimeError):
    """Training that cannot go on."""


class HealthError(TrainingError):
    """A run that could go on, but has stopped learning (`trainer.health`)."""


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks, cut after 240 characters; its type if it has no
    text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:240] + "..."


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    if isinstance(error, (OSError, ValueError)) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def place(error: BaseException, file: str | None) -> str | None:
    """`name:line` of the last place in a user's file that an error passed through, if any."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == file
    ]
    return f"{Path(file).name}:{lines[-1]}" if lines else None


def raised(error: BaseException, file: str | None) -> str:
    """What a user's code raised, in one line: `raised KeyError: 'a' (my_loss.py:2)`.

    file: the file whose last line the error passed through is named.
    """
    text, where = " ".join(str(error).split()), place(error, file)
    at = f" ({where})" if where else ""
    return f"raised {type(error).__name__}{text and f': {text:.300}'}{at}"
