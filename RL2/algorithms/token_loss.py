"""From a loss's name or file to a function that the actor can call.

The signature of a token loss is its declaration: see `RL2.algorithms.losses`.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from RL2.algorithms import contract
from RL2.algorithms.losses import LOSSES
from RL2.algorithms.segments import SEGMENTS, Pairs, Segments
from RL2.algorithms.trial import kind_of, try_out
from RL2.config.elsewhere import value_here
from RL2.ops.token_stats import STATISTICS
from RL2.runtime.errors import ConfigError, first_line, place
from RL2.runtime.user_code import Unfit, undisturbed

FIELDS: tuple[str, ...] = ("advantages", "old_logps", "ref_logps", "llm_logps", "rewards")


@dataclass(frozen=True)
class TokenLoss:
    """A loss with its options bound, and what it has to be given.

    `inputs` are the names of its tensors in the order in which the function takes them. `top_k` is
    how many columns of `top_logps` it wants, which its option `max_rank` says; 0 without them.
    `origin` is the key and value that chose it. `draws`: whether it was seen to draw random
    numbers. `kind`: what it returns one value of, a key of `RL2.algorithms.segments.KINDS`.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    top_k: int = 0
    origin: str = "actor.loss"
    draws: bool = False
    kind: str | None = "tokens"

    @property
    def statistics(self) -> tuple[str, ...]:
        """The inputs that are token statistics: what `token_stats` is asked for."""
        return tuple(name for name in self.inputs if name in STATISTICS)

    @property
    def fields(self) -> tuple[str, ...]:
        """The inputs that are fields of the batch."""
        return tuple(name for name in self.inputs if name in FIELDS)

    @property
    def segments(self) -> tuple[str, ...]:
        """Those of `sequences`, `groups` and `pairs` that must not be cut; none for a loss of
        tokens each by itself."""
        named = tuple(name for name in self.inputs if name in SEGMENTS)
        return named and tuple(dict.fromkeys(("sequences", *named)))

    @property
    def uses_advantages(self) -> bool:
        """Whether the loss takes the advantages."""
        return "advantages" in self.inputs

    @property
    def is_multiplied(self) -> bool:
        """Whether the advantages multiply the loss: where it does not take them itself. A group or
        a pair has none of its own."""
        return not self.uses_advantages and self.kind in ("tokens", "sequences")

    def __call__(
        self, tensors: Mapping[str, Tensor | Segments | Pairs]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics `{name: metric}`, one value each of the `kind`, from (at least) the
        `inputs` by name, each `[N]` but `top_logps`, which is `[N, top_k]`, and the `segments`.

        Raises:
            Unfit: see `RL2.algorithms.contract.call`.
        """
        given = {name: tensors[name] for name in self.inputs}
        return contract.call(self.function, given, self.kind)


def resolve_loss(
    loss_config: Mapping[str, Any], fallbacks: Mapping[str, Any] | None = None
) -> TokenLoss:
    """The loss that `actor.loss` names.

    Args:
        loss_config: the node. `import_path`, if not null, is a function in a file or module
            (`my_loss.py:my_loss`, `package.module:my_loss`), else `name` is a key of `LOSSES`.
            Every other entry that is not null, and every entry of the mapping `options`, must be
            a keyword-only parameter of the function, and is bound.
        fallbacks: values for options that the configuration leaves open, such as `actor.clip`
            for both clips; those that the function does not take are ignored.

    The loss is tried on made-up tokens, so that one which cannot train is found here and not after
    the first rollout (`RL2.algorithms.trial`).

    Raises:
        ConfigError: unknown name, missing file, module or function, a parameter that is neither
            statistic nor field, an option that the function does not take, an option without
            value, `top_logps` without a `max_rank` of 1 or more, or a trial that raises, does not
            return one value a token (or sequence, group, pair), has no gradient, or gives numbers
            that are not finite.
    """
    if OmegaConf.is_config(loss_config):
        loss_config = OmegaConf.to_container(loss_config, resolve=True)
    options = {key: value for key, value in loss_config.items() if value is not None}
    name, import_path = options.pop("name", None), options.pop("import_path", None)
    extra = options.pop("options", {})

    if import_path is not None:
        origin = f"actor.loss.import_path={import_path}"
        function = _import_function(import_path, origin)
        name = getattr(function, "__name__", import_path.rpartition(":")[2])
    else:
        origin = f"actor.loss.name={name}"
        if name not in LOSSES:
            here = value_here("loss.name", name)
            hint = f"{here}; " if here else _did_you_mean(name, LOSSES)
            raise ConfigError(
                f"{origin}: unknown; {hint}use {', '.join(LOSSES)}, "
                "or actor.loss.import_path=my_loss.py:my_loss for your own"
            )
        function = LOSSES[name]

    inputs, defaults = _signature(function, origin)
    for key, path in [(key, f"actor.loss.{key}") for key in options] + [
        (key, f"actor.loss.options.{key}") for key in extra
    ]:
        if key not in defaults:
            takes = f"it takes {', '.join(defaults)}" if defaults else "it takes no options"
            raise ConfigError(
                f"{path}={(options | extra)[key]}: no option of {origin}; "
                f"{_did_you_mean(key, defaults)}{takes}"
            )
        if key in options and key in extra:
            raise ConfigError(
                f"actor.loss.{key} and actor.loss.options.{key}: the same option twice; keep one"
            )

    bound = {key: value for key, value in (fallbacks or {}).items() if key in defaults}
    bound |= options | {key: value for key, value in extra.items() if value is not None}
    for key, default in defaults.items():
        if default is inspect.Parameter.empty and key not in bound:
            raise ConfigError(
                f"{origin}: its option {key} has no default; set actor.loss.options.{key}=..."
            )
    top_k = _columns(defaults | bound, origin) if "top_logps" in inputs else 0
    loss = TokenLoss(name, partial(function, **bound), inputs, top_k, origin)
    if loss.segments:
        of_any = replace(loss, kind=None)
        loss = replace(loss, kind=kind_of(of_any, inputs, loss.statistics, top_k, origin))
    draws = try_out(loss, function, inputs, loss.statistics, top_k, origin)
    return replace(loss, draws=draws)


def _did_you_mean(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


def _import_function(import_path: str, origin: str) -> Callable[..., Any]:
    location, separator, name = import_path.rpartition(":")
    if not (separator and location and name):
        raise ConfigError(
            f"{origin}: expected file.py:function or package.module:function, such as "
            "my_loss.py:my_loss"
        )
    try:
        is_file = location.endswith(".py")
        with undisturbed():
            module = _load_file(location) if is_file else importlib.import_module(location)
    except Unfit as fault:
        raise ConfigError(f"{origin}: importing {location}, {fault}") from fault
    except FileNotFoundError as error:
        raise ConfigError(
            f"{origin}: there is no file {Path(location).absolute()}; give a path relative to the "
            "working directory, or an absolute one"
        ) from error
    except BaseException as error:  # a stranger's file may raise anything
        where = place(error, str(Path(location).resolve()))
        raise ConfigError(
            f"{origin}: importing {location} raised {type(error).__name__}: {error}"
            + (f" ({where})" if where else "")
            + "; make it importable"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ConfigError(
            f"{origin}: no function {name} in {location}; {_did_you_mean(name, found)}"
            f"it defines {', '.join(found) or 'no functions'}"
        )
    return function


def _load_file(location: str) -> ModuleType:
    path = Path(location).resolve()
    if not path.is_file():
        raise FileNotFoundError(location)
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"_{path.stem}_{digest}"  # two files of one name are two modules
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _signature(function: Callable[..., Any], origin: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the tensors that a loss takes, and its options with their defaults."""
    inputs, options = [], {}
    known = (*STATISTICS, *FIELDS, *SEGMENTS)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{origin}: {first_line(error)}; its parameters say what a loss needs, so give a "
            "function that is written in Python"
        ) from error
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[parameter.name] = parameter.default
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(
                f"{origin}: its parameter {parameter} does not say what the loss needs; "
                f"name tensors out of {', '.join(known)}, and options after a lone *"
            )
        elif parameter.name not in known:
            raise ConfigError(
                f"{origin}: its parameter {parameter.name} is neither a token statistic nor a "
                f"batch field; {_did_you_mean(parameter.name, known)}use {', '.join(known)}; "
                "options stand after a lone *"
            )
        else:
            inputs.append(parameter.name)
    if not set(inputs) & set(STATISTICS):
        raise ConfigError(
            f"{origin}: takes no token statistic, so nothing can be trained; "
            f"name at least one of {', '.join(STATISTICS)} as a parameter"
        )
    return tuple(inputs), options


def _columns(options: Mapping[str, Any], origin: str) -> int:
    """How many columns of `top_logps` a loss wants: its option `max_rank`."""
    if "max_rank" not in options:
        raise ConfigError(
            f"{origin}: takes top_logps without saying how many of them; give it an option such "
            "as max_rank=8 after a lone *"
        )
    max_rank = options["max_rank"]
    if not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1:
        raise ConfigError(
            f"{origin}: its option max_rank={max_rank} must be a whole number, 1 or more"
        )
    return max_rank
