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
    GIVEN_BY,
    OLD_STATISTICS,
    bind_options,
    did_you_mean,
    import_function,
    parameters_of,
)
from RL2.config.flat import as_text
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
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    origin: str = "adv"
    what: str = "advantages"

    @property
    def fields(self) -> dict[str, str]:
        """The field of a batch for each of its inputs."""
        by_statistic = {now: field for field, now in OLD_STATISTICS.items()}
        by_statistic["values"] = "old_values"
        return {name: by_statistic.get(name, name) for name in self.inputs}

    @property
    def has_critic(self) -> bool:
        """Whether it takes the values of a critic, which is then trained."""
        return "values" in self.inputs

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`advantages [B, T]`, or `what` it is for, of a batch, and `returns [B, T]` if it gives
        them; 0 where `action_mask` is False.

        Raises:
            Unfit: it raises, changes its inputs or settings of the whole process, or returns
                something else than finite numbers.
        """
        tensors = {name: batch[field] for name, field in self.fields.items()}
        result = contract.attempt(self.function, tensors)
        found = {self.what: result}
        if isinstance(result, tuple):
            found = self._of_tuple(result)
        return {name: _checked(name, x, batch["action_mask"], tensors) for name, x in found.items()}

    def _of_tuple(self, result: tuple) -> dict[str, Any]:
        if len(result) != 2 or not isinstance(result[1], Mapping) or {*result[1]} != {"returns"}:
            raise Unfit(
                'it returned a tuple that is not (advantages, {"returns": returns}); return the '
                "advantages, or that"
            )
        if not self.has_critic:
            raise Unfit(
                "it returned returns, which nothing learns without a critic; name values among its "
                "parameters, or return the advantages alone"
            )
        return {self.what: result[0], **result[1]}


def _checked(name: str, x: Any, mask: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(x, Tensor) or x.shape != mask.shape:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise Unfit(
            f"{name} of {len(mask)} rows came back as {got}, expected a tensor "
            f"{list(mask.shape)}; return one value per token, such as "
            "value_per_row.unsqueeze(-1) * action_mask"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise Unfit(
            f"{name} came back as {str(x.dtype).removeprefix('torch.')}, expected float32 or "
            "float64"
        )
    if x.layout != torch.strided or x.device != mask.device:
        raise Unfit(f"{name} came back sparse or not on {mask.device}; return them there")
    x = x.detach().masked_fill(~mask, 0.0)
    bad = ~x.isfinite()
    if bad.any() and all(_has_no_bad_values(one, of, mask) for one, of in given.items()):
        row, token = bad.nonzero()[0].tolist()
        raise Unfit(
            f"{int(bad.sum())} of {int(mask.sum())} {name} are not finite, the first of them "
            f"{x[row, token]} in row {row}"
        )
    return x


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
    known = tuple(dict.fromkeys((*ESTIMATOR_FIELDS, *GIVEN_BY, *brought)))
    kinds = "no field of a batch"
    inputs, defaults = parameters_of(function, known, origin, "estimator", kinds)
    if not inputs:
        raise ConfigError(f"{origin}: takes nothing of a batch; name fields such as rewards")
    # the returns that a critic learns if the estimator gives none
    taken_elsewhere = ("gamma",) if "values" in inputs else ()
    for key, value in keys.items():
        if key in taken_elsewhere:
            continue
        if key not in defaults and value is not None and value != _NEUTRAL.get(key):
            way_out = f"set it to {as_text(_NEUTRAL[key])}" if key in _NEUTRAL else "leave it out"
            raise ConfigError(f"adv.{key}={as_text(value)}: has no effect with {origin}; {way_out}")
    taken = {
        key: value
        for key, value in keys.items()
        if key in defaults and value is not None
        and not (key in own and value == _NEUTRAL.get(key))
    }  # fmt: skip
    bound = bind_options(defaults, taken, own, origin, "adv")
    estimator = Estimator(name, partial(function, **bound), inputs, origin)
    given = try_out(estimator, function, origin)
    gamma = keys.get("gamma", 1.0)
    if "returns" in given and "gamma" not in defaults and gamma != _NEUTRAL["gamma"]:
        raise ConfigError(
            f"adv.gamma={gamma}: has no effect with {origin}, which gives the critic's returns "
            "itself; make gamma one of its options, or leave it out"
        )
    return estimator
