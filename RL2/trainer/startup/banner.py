"""What a run logs about itself before its first step."""

from collections.abc import Iterable

import torch
from omegaconf import DictConfig
from torch import nn

from RL2.trainer.sources.source import Source


def banner(
    config: DictConfig,
    device: torch.device,
    n_ranks: int,
    parameters: Iterable[nn.Parameter],
    dtype: torch.dtype,
    source: Source,
    done: int,
    n_steps: int,
) -> list[str]:
    """Two lines: what is trained on what, and which steps the run will take.

    done: the last step already done.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    n_all, n_trained = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    of = "" if n_trained == n_all else f" of {short(n_all)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f"{n_ranks} x {name}" if n_ranks > 1 else name
    if device.type == "cpu":
        n_threads = torch.get_num_threads()
        where += f" ({n_threads} thread{'s' * (n_threads != 1)})"
    data = ", ".join(f"{n} {what}" for what, n in source.rows.items())
    loss = config.actor.loss.import_path or config.actor.loss.name
    steps = f"steps {done + 1} to {n_steps}" if done < n_steps else f"all {n_steps} steps done"
    if config.trainer.max_steps is not None and config.trainer.max_steps > n_steps:
        steps += (
            f" (trainer.n_epochs={config.trainer.n_epochs} ends there, before "
            f"trainer.max_steps={config.trainer.max_steps})"
        )
    return [
        f"{config.actor.model_name}: {short(n_trained)}{of} parameters trained by {loss} in "
        f"{str(dtype).removeprefix('torch.')} on {where}; "
        f"{data or 'prompts by the environment'}",
        f"{steps}, {source.per_step}; everything is written to {config.trainer.save_dir}",
    ]


def short(n: int) -> str:
    """A number with three digits and a unit: 1.06M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
