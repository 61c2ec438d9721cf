"""What a token loss has to keep to, looked at in every call without waiting for the device.

A trial shows what a loss does on made-up tokens; what it does after a thousand steps, only that
call shows.
"""

import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from RL2.runtime.errors import place
from RL2.runtime.user_code import Unfit, file_of, settings_kept

# What an update writes under `actor/` itself.
RESERVED = (
    "entropy", "grad_norm", "kl", "loss", "lr", "nonfinite", "p_max", "skipped", "tis_masked",
)  # fmt: skip


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
