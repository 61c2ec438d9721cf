"""AdamW's learning rate over a run: warm-up, decay, and the least it falls to."""

from collections.abc import Callable
from functools import partial

from omegaconf import DictConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def schedule(optimizer: Optimizer, config: DictConfig, n_updates: int, done: int = 0) -> LambdaLR:
    """The schedule of `n_updates` optimizer steps, of which `done` were made.

    Rate, betas and weight decay come from the config, not from what was loaded with the moments.

    config: a learner's node, such as `actor`.
    """
    floor = config.min_lr_ratio
    warmup = int(config.warmup_ratio * n_updates)
    _reset(optimizer, config)
    factors = get_scheduler(
        # transformers' `constant` ignores the warm-up that `warmup_ratio` asks for
        "constant_with_warmup" if config.scheduler == "constant" else str(config.scheduler),
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=n_updates,
        scheduler_specific_kwargs=_arguments(config, n_updates),
    ).lr_lambdas
    if floor > 0 and config.scheduler != "polynomial":
        factors = [partial(_above, factor, warmup, floor) for factor in factors]
    _reset(optimizer, config)  # making a schedule has set the rate of its first step
    return LambdaLR(optimizer, factors, last_epoch=done - 1)


def _reset(optimizer: Optimizer, config: DictConfig) -> None:
    for group in optimizer.param_groups:
        group |= {"lr": config.lr, "initial_lr": config.lr}
        group |= {"betas": tuple(config.betas), "weight_decay": config.weight_decay}


def _arguments(config: DictConfig, n_updates: int) -> dict[str, float]:
    """What transformers' function of the schedule takes besides the numbers of steps."""
    if config.scheduler == "warmup_stable_decay":
        return {"num_decay_steps": max(1, int((config.decay_ratio or 0.1) * n_updates))}
    if config.scheduler == "polynomial" and config.min_lr_ratio > 0:  # it has a floor of its own
        return {"lr_end": config.min_lr_ratio * config.lr}
    return {}


def _above(factor: Callable[[int], float], warmup: int, floor: float, step: int) -> float:
    """A factor of the rate that falls to `floor` where the given one falls to 0."""
    value = factor(step)
    return value if step < warmup else floor + (1 - floor) * value
