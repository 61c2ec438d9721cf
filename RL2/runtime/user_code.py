"""User code in this process: it must not change process-wide settings."""

import inspect
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


def _go_to(path: str) -> None:
    with suppress(OSError):
        os.chdir(path)


# Process-wide settings that a loss must not change: how to read each one, and how to restore it.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms,
    ),
    "torch.autograd.set_detect_anomaly": (
        torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly,
    ),
    "os.chdir": (_folder, _go_to),
}  # fmt: skip
# Reading this takes 40 us, so it is checked only around imports.
_OF_AN_IMPORT = {
    "torch.set_default_device": (
        torch.get_default_device, lambda _: torch.set_default_device(None),
    ),
}  # fmt: skip


class Unfit(Exception):
    """User code did something that it must not do; the text says what."""


@contextmanager
def settings_kept(known: Mapping[str, tuple[Callable, Callable]] = _SETTINGS) -> Iterator[None]:
    """Restore the process-wide settings that the body has changed. Raises Unfit if it changed any
    and raised nothing itself."""
    before = {name: read() for name, (read, _) in known.items()}
    changed: list[str] = []
    try:
        yield
    finally:
        changed += [name for name, (read, _) in known.items() if read() != before[name]]
        for name in changed:
            known[name][1](before[name])
    if changed:
        raise Unfit(f"it called {changed[0]}, which changes the whole run; leave that out")


@contextmanager
def undisturbed() -> Iterator[None]:
    """`settings_kept` for the import of a user's file. What it imports may install signal handlers
    and set seeds: these are restored silently."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), settings_kept(_SETTINGS | _OF_AN_IMPORT):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: installed by C code
                    signal.signal(number, handler)


def file_of(function: Callable[..., Any]) -> str | None:
    """The file that defines a function, if it is a Python function."""
    while isinstance(function, partial):
        function = function.func
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
