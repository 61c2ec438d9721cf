"""From an advantage estimator's name or file to a function that the run can call."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from RL2.algorithms import contract
from RL2.algorithms.advantages import ADVANTAGES
from RL2.algorithms.estimator_trial import try_out
from RL2.algorithms.parameters import (
    ESTIMATOR_FIELDS,
    OLD_STATISTICS,
    bind_options,
    did_you_mean,
    import_function,
    parameters_of,
)
from RL2.runtime.errors import ConfigError
from RL2.runtime.user_code import Unfit

# What an option of `adv` must be left at when the estimator does not take it.
_NEUTRAL = {"gamma": 1.0, "lamda": 1.0, "global_norm": False, "norm_var": False}
# Statistics that are -inf if a token was certain or impossible.
_MAY_BE_INFINITE = ("log1mps", "max_log1mps")


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator with its options bound, and the inputs that it needs.

    `inputs` are the names of its tensors in the order in which the function takes them (see
    `RL2.algorithms.parameters`). `origin` is the key and value that chose it, `what` it returns.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    origin: str = "adv"
    what: str = "advantages"

    @property
    def fields(self) -> dict[str, str]:
        """The field of a batch for each of its inputs."""
        by_statistic = {now: field for field, now in OLD_STATISTICS.items()}
        return {name: by_statistic.get(name, name) for name in self.inputs}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Advantages, or `what` it returns, `[B, T]` of a batch, 0 where `action_mask` is False.

        Raises:
            Unfit: it raises, changes its inputs or settings of the whole process, or returns
                something else than finite numbers.
        """
        tensors = {name: batch[field] for name, field in self.fields.items()}
        mask = batch["action_mask"]
        advantages = contract.attempt(self.function, tensors)
        if not isinstance(advantages, Tensor) or advantages.shape != mask.shape:
            is_tensor = isinstance(advantages, Tensor)
            got = list(advantages.shape) if is_tensor else type(advantages).__name__
            raise Unfit(
                f"{self.what} of {len(mask)} rows came back as {got}, expected a tensor "
                f"{list(mask.shape)}; return one value per token, such as "
                "value_per_row.unsqueeze(-1) * action_mask"
            )
        if advantages.dtype not in (torch.float32, torch.float64):
            dtype = str(advantages.dtype).removeprefix("torch.")
            raise Unfit(f"{self.what} came back as {dtype}, expected float32 or float64")
        if advantages.layout != torch.strided or advantages.device != mask.device:
            raise Unfit(f"{self.what} came back sparse or not on {mask.device}; return them there")
        advantages = advantages.detach().masked_fill(~mask, 0.0)
        bad = ~advantages.isfinite()
        if bad.any() and all(_has_no_bad_values(name, x, mask) for name, x in tensors.items()):
            row, token = bad.nonzero()[0].tolist()
            raise Unfit(
                f"{int(bad.sum())} of {int(mask.sum())} {self.what} are not finite, the first of "
                f"them {advantages[row, token]} in row {row}"
            )
        return advantages


def _has_no_bad_values(name: str, given: Tensor, mask: Tensor) -> bool:
    """Whether an input cannot be the reason for advantages that are not finite."""
    if not given.is_floating_point():
        return True
    given = given[mask]
    if name in _MAY_BE_INFINITE:
        given = given.nan_to_num(nan=torch.nan, neginf=0.0)
    return bool(given.isfinite().all())


def resolve_advantage(adv_config: Mapping[str, Any], brought: Collection[str] = ()) -> Estimator:
    """The estimator that `adv` names, its options bound.

    Args:
        adv_config: the `adv` node. `import_path`, if not null, is a function in a file or module
            (`my_estimator.py:f`, `package.module:f`), else `estimator` is a key of `ADVANTAGES`.
            Every entry of the mapping `options` must be a keyword-only parameter of the function.
            So must every other entry that is neither null nor at its neutral value (gamma=1,
            lamda=1, global_norm=false, norm_var=false); where it is, its value is that of `adv`.
        brought: fields `[B, T]` of the run's batches that it may name as well.

    The estimator is tried on made-up batches (`RL2.algorithms.estimator_trial`).

    Raises:
        ConfigError: an unknown estimator, one that cannot be imported, a parameter that is no
            field, an option without effect or without value, or a trial that goes wrong.
    """
    if OmegaConf.is_config(adv_config):
        adv_config = OmegaConf.to_container(adv_config, resolve=True)
    keys = dict(adv_config)
    name, import_path = keys.pop("estimator", None), keys.pop("import_path", None)
    own = keys.pop("options", {})
    if import_path is not None:
        origin = f"adv.import_path={import_path}"
        function = import_function(import_path, origin, "my_estimator.py:my_estimator")
        name = getattr(function, "__name__", import_path.rpartition(":")[2])
    elif name in ADVANTAGES:
        origin, function = f"adv.estimator={name}", ADVANTAGES[name]
    else:
        raise ConfigError(
            f"adv.estimator={name}: unknown; {did_you_mean(name, ADVANTAGES)}use "
            f"{', '.join(ADVANTAGES)}, or adv.import_path=my_estimator.py:my_estimator for your own"
        )
    known = tuple(dict.fromkeys((*ESTIMATOR_FIELDS, *brought)))
    kinds = "no field of a batch"
    inputs, defaults = parameters_of(function, known, origin, "estimator", kinds)
    if not inputs:
        raise ConfigError(f"{origin}: takes nothing of a batch; name fields such as rewards")
    for key, value in keys.items():
        if key not in defaults and value is not None and value != _NEUTRAL.get(key):
            way_out = f"set it to {_NEUTRAL[key]}" if key in _NEUTRAL else "leave it out"
            raise ConfigError(f"adv.{key}={value}: has no effect with {origin}; {way_out}")
    taken = {
        key: value
        for key, value in keys.items()
        if key in defaults and value is not None
        and not (key in own and value == _NEUTRAL.get(key))
    }  # fmt: skip
    bound = bind_options(defaults, taken, own, origin, "adv")
    estimator = Estimator(name, partial(function, **bound), inputs, origin)
    try_out(estimator, function, origin)
    return estimator
