"""What a token loss has to keep to, looked at in every call without waiting for the device.

A trial shows what a loss does on made-up tokens; what it does after a thousand steps, only that
call shows.
"""

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
from torch import Tensor

from RL2.config.errors import place

# What an update writes under `actor/` itself.
RESERVED = (
    "entropy", "grad_norm", "kl", "loss", "lr", "nonfinite", "p_max", "skipped", "tis_masked",
)  # fmt: skip


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
    """The loss cannot train on the tokens at hand; the text says why."""


def call(
    function: Callable[..., Any], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses `[N]` and metrics `{name: [N]}`, these without gradient, of a loss called with
    `tensors` in their order.

    Raises:
        Unfit: it raises, changes what it was given or what the whole process uses, or returns
            something else.
    """
    versions = {name: tensor._version for name, tensor in tensors.items()}
    try:
        with settings_kept():
            result = function(*tensors.values())
    except Unfit:
        raise
    except BaseException as error:  # also of exit(), which would end the run as if it had worked
        ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if isinstance(error, KeyboardInterrupt) and ctrl_c:
            raise
        said = " ".join(str(error).split())
        where = place(error, file_of(function))
        at = f" ({where})" if where else ""
        raise Unfit(f"it raised {type(error).__name__}{said and f': {said:.300}'}{at}") from error
    for name, tensor in tensors.items():
        if tensor._version != versions[name]:
            raise Unfit(
                f"it changed {name} in place, which others read; use {name}.clone() or operations "
                "without a trailing underscore"
            )
    per_token = next(iter(tensors.values()))
    return _checked(result, len(per_token), per_token.device)


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


def _checked(result: Any, n: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    if isinstance(result, tuple):
        if len(result) != 2 or not isinstance(result[1], Mapping):
            got = ", ".join(type(one).__name__ for one in result)
            raise Unfit(f"it returned ({got}); return the losses, or (losses, {{name: metric}})")
        losses, metrics = result
    else:
        losses, metrics = result, {}
    if (fault := _fault(losses, n, device)) is not None:
        raise Unfit(f"losses {fault}")
    if losses.dtype not in (torch.float32, torch.float64):
        raise Unfit(
            f"losses of {n} tokens came back as {_name(losses.dtype)}, expected float32; compute "
            "them from what the loss is given without rounding"
        )
    for name, values in metrics.items():
        if not isinstance(name, str):
            raise Unfit(f"its metric {name!r} has no name; use text as the key")
        if name in RESERVED:
            raise Unfit(
                f"its metric {name} has the name of one that every update writes (actor/{name}); "
                f"use another than {', '.join(RESERVED)}"
            )
        if (fault := _fault(values, n, device)) is not None:
            raise Unfit(f"{name} {fault}")
        if values.is_complex():
            raise Unfit(f"{name} of {n} tokens came back as {_name(values.dtype)}; use float32")
    return losses, {name: _number(values.detach()) for name, values in metrics.items()}


def _fault(values: Any, n: int, device: torch.device) -> str | None:
    """What is wrong with what should be one value per token."""
    if not isinstance(values, Tensor) or values.shape != (n,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        return (
            f"of {n} tokens came back as {got}, expected a tensor [{n}]; return one value per "
            "token, without averaging"
        )
    if values.device != device:
        return (
            f"of {n} tokens came back on {values.device}, expected {device}; make tensors with "
            "torch.zeros_like(logps) and the like"
        )
    if values.layout != torch.strided:
        return f"of {n} tokens came back as a sparse tensor; return a dense one"
    return None


def _number(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.to(torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
