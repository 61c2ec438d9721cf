"""A user's code in this process: it may not change what the whole process uses."""

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
    except OSError:  # somebody has removed it
        return ""


def _go_to(path: str) -> None:
    with suppress(OSError):
        os.chdir(path)


# Of the whole process: how to read what a loss may not change, and how to put it back.
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
# This takes 40 us to read.
_OF_AN_IMPORT = {
    "torch.set_default_device": (
        torch.get_default_device, lambda _: torch.set_default_device(None),
    ),
}  # fmt: skip


class Unfit(Exception):
    """What a user's code did that it may not do; the text says it."""


@contextmanager
def settings_kept(known: Mapping[str, tuple[Callable, Callable]] = _SETTINGS) -> Iterator[None]:
    """Put back what the body has changed of the whole process, and raise Unfit where it has and
    comes to its end."""
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
    """`settings_kept` for the import of a stranger's file, which may well have handlers for signals
    and seeds by way of what it imports: they are put back without a word."""
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
                if handler is not None:  # of a library in C
                    signal.signal(number, handler)


def file_of(function: Callable[..., Any]) -> str | None:
    """Where a function was written, if that is in Python."""
    while isinstance(function, partial):
        function = function.func
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
