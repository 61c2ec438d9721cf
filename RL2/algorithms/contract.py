"""What a loss must keep to, checked in every call without waiting for the device.

A trial shows what a loss does on made-up tokens; what it does after a thousand steps, only that
call shows.
"""

import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from RL2.algorithms.segments import KINDS, Pairs, Segments, kinds_of
from RL2.runtime.errors import raised
from RL2.runtime.user_code import Unfit, file_of, settings_kept

# The metrics that every update writes under `actor/`.
RESERVED = (
    "entropy", "grad_norm", "kl", "loss", "lr", "mean_ratio", "nonfinite", "p_max", "ratio_skipped",
    "skipped", "tis_masked",
)  # fmt: skip


def call(
    function: Callable[..., Any], tensors: Mapping[str, Tensor | Segments | Pairs], kind: str | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call a loss with `tensors` in their order; returns its losses, and its metrics
    `{name: metric}` without gradient. They have one value per element of the `kind`, a key of
    `RL2.algorithms.segments.KINDS`; None allows any kind in `tensors`.

    Raises:
        Unfit: it raises, changes its inputs or settings of the whole process, or returns something
            else.
    """
    result = attempt(function, tensors)
    per_token = next(x for x in tensors.values() if isinstance(x, Tensor))
    kinds = kinds_of(len(per_token), tensors)
    kinds = kinds if kind is None else {kind: kinds[kind]}
    return _checked(result, kinds, per_token.device)


def attempt(function: Callable[..., Any], tensors: Mapping[str, Tensor | Segments | Pairs]) -> Any:
    """What a user's function returns for `tensors` in their order.

    Raises:
        Unfit: it raises, or changes its inputs or settings of the whole process.
    """
    given = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    versions = {name: tensor._version for name, tensor in given.items()}
    try:
        with settings_kept():
            result = function(*tensors.values())
    except Unfit:
        raise
    except BaseException as error:  # also exit(), which would end the run as if it had worked
        ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if isinstance(error, KeyboardInterrupt) and ctrl_c:
            raise
        raise Unfit(f"it {raised(error, file_of(function))}") from error
    for name, tensor in given.items():
        if tensor._version != versions[name]:
            raise Unfit(
                f"it changed {name} in place, which others read; use {name}.clone() or operations "
                "without a trailing underscore"
            )
    return result


def _checked(
    result: Any, kinds: Mapping[str, int], device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    many = _or([f"{n} {name}" for name, n in kinds.items()])
    if isinstance(result, tuple):
        if len(result) != 2 or not isinstance(result[1], Mapping):
            got = ", ".join(type(one).__name__ for one in result)
            raise Unfit(f"it returned ({got}); return the losses, or (losses, {{name: metric}})")
        losses, metrics = result
    else:
        losses, metrics = result, {}
    if (fault := _fault(losses, kinds, device)) is not None:
        raise Unfit(f"losses of {many} {fault}")
    kinds = {name: n for name, n in kinds.items() if n == len(losses)}  # the metrics' as well
    if losses.dtype not in (torch.float32, torch.float64):
        raise Unfit(
            f"losses of {many} came back as {_name(losses.dtype)}, expected float32; compute "
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
        many = _or([f"{n} {kind}" for kind, n in kinds.items()])
        if (fault := _fault(values, kinds, device)) is not None:
            raise Unfit(f"{name} of {many} {fault}")
        if values.is_complex():
            raise Unfit(f"{name} of {many} came back as {_name(values.dtype)}; use float32")
    return losses, {name: _number(values.detach()) for name, values in metrics.items()}


def _fault(values: Any, kinds: Mapping[str, int], device: torch.device) -> str | None:
    """What is wrong with values that should be one per token, or per element of another kind."""
    if not isinstance(values, Tensor) or values.shape not in [(n,) for n in kinds.values()]:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        shapes, elements = _or([f"[{n}]" for n in kinds.values()]), _or([KINDS[k] for k in kinds])
        return (
            f"came back as {got}, expected a tensor {shapes}; return one value per {elements}, "
            "without averaging"
        )
    if values.device != device:
        return (
            f"came back on {values.device}, expected {device}; make tensors with "
            "torch.zeros_like(logps) and the like"
        )
    if values.layout != torch.strided:
        return "came back as a sparse tensor; return a dense one"
    return None


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _number(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.to(torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
