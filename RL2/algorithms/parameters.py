"""What a user's function needs, as its parameters say.

The positional parameters of a loss or an advantage estimator name tensors, its keyword-only ones
are options. The names, with N action tokens in a loss and B rows of T tokens in an estimator:

    name                        loss                            estimator
    logps                       [N], with gradient              no: it is old_logps
    log1mps max_logps           [N], with gradient              [B, T], of the policy before the
    max_log1mps entropy                                         updates on this batch
    ranks                       [N]                             [B, T], the same
    top_logps                   [N, K], with gradient           no
    values                      [N], with gradient, in place    [B, T], of the critic before its
                                of all that stands above        update
    old_values returns          [N], of the critic before its   no
                                update, and what it learns
    at_logps                    [N, K], with gradient: log p    no
                                of the teacher's K tokens
    teacher_top_logps           [N, K], log p of the teacher    no
                                for the same tokens
    top_ids teacher_top_ids     [N, K] int32, the tokens        no
    old_log1mps old_max_logps   [N], of the policy before the   no: without old_
    old_max_log1mps             updates on this batch
    old_entropy old_ranks
    old_logps ref_logps         [N]                             [B, T]
    teacher_logps               [N]                             [B, T]
    llm_logps rewards           [N]                             [B, T]
    advantages                  [N]                             no: it makes them
    turn_ids                    [N] int64, the turn of its      [B, T] int64, -1 at tokens of no
                                sample, from 0                  turn
    action_mask                 no: all N are actions           [B, T] bool
    sample_ids group_ids        no                              [B] int64
    lengths                     no                              [B] int64, tokens of the row
    correct                     no                              [B] bool, reward above 0
    labels mismatch_kl          [N]; see `losses.preferences`   no
    reward_parts reward_weights no                              [B, K] float64, the K rewards of
                                                                `rollout.rewards`
    a judge's field, or one     [N]                             [B, T]
    that a source brings
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import BooleanNode
from omegaconf.errors import ValidationError

from RL2.ops.token_stats import SEVERAL, STATISTICS
from RL2.runtime.errors import ConfigError, first_line, place
from RL2.runtime.user_code import Unfit, undisturbed

HEADS: dict[str, tuple[str, ...]] = {"token_stats": STATISTICS, "scalar": ("values",)}
"""What a learner's head (`RL2.models.heads.HEADS`) gives a loss, with gradient. Each has the first
of them in every update."""

LEARNED: tuple[str, ...] = tuple(name for names in HEADS.values() for name in names)
"""Statistics of any head. A loss takes those of one."""

OLD_STATISTICS: dict[str, str] = {
    f"old_{name}": name for name in STATISTICS if name not in ("logps", *SEVERAL)
}
"""Fields with a statistic of the policy before the updates on a batch, besides `old_logps`."""

TEACHER_FIELDS: dict[str, str] = {
    "teacher_logps": "logps", "teacher_top_logps": "top_logps", "teacher_top_ids": "top_ids",
}  # fmt: skip
"""Fields with a statistic of the teacher, `[B, T]` or `[B, T, K]`."""

FIELDS: tuple[str, ...] = (
    "advantages", "old_logps", "ref_logps", "llm_logps", "rewards", "turn_ids", *OLD_STATISTICS,
    *TEACHER_FIELDS, "old_values", "returns",
)  # fmt: skip
"""Fields of a batch that a loss may name in every run with rollouts; the last two with a critic."""

DATA_FIELDS: tuple[str, ...] = ("labels", "mismatch_kl")
"""Fields of a batch that a loss may name in a run on labelled answers."""

ROW_FIELDS: tuple[str, ...] = (
    "sample_ids", "group_ids", "lengths", "correct", "reward_parts", "reward_weights",
)  # fmt: skip
"""Fields `[B]` or `[B, K]` of a batch, which a loss may not name."""

GIVEN_BY: dict[str, str] = {
    "greedy_reward": "rollout.judges=[greedy]",
    "reward_parts": "rollout.rewards={name: weight, ...}",
}
"""Fields that a built-in estimator names, and the setting that brings them."""

ESTIMATOR_FIELDS: tuple[str, ...] = (
    "rewards", "action_mask", *ROW_FIELDS, "turn_ids", "old_logps", "ref_logps", "llm_logps",
    "teacher_logps", *OLD_STATISTICS.values(), "values",
)  # fmt: skip
"""What an advantage estimator may name in every run with rollouts."""


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A question about the closest known name, with a space after it; empty if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


def import_function(import_path: str, origin: str, example: str = "my_loss.py:my_loss") -> Any:
    """The function, or class, that `file.py:name` or `package.module:name` names.

    origin: the key and value that say so; errors begin with them.

    Raises:
        ConfigError: there is none, or its file cannot be imported.
    """
    location, separator, name = import_path.rpartition(":")
    if not (separator and location and name):
        raise ConfigError(
            f"{origin}: expected file.py:function or package.module:function, such as {example}"
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
    except BaseException as error:  # user code may raise anything
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
            if (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == module.__name__
        ]
        raise ConfigError(
            f"{origin}: no {name} in {location}; {did_you_mean(name, found)}"
            f"it defines {', '.join(found) or 'no functions or classes'}"
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


def parameters_of(
    function: Callable[..., Any], known: Collection[str], origin: str, what: str, kinds: str
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the tensors that a function takes, and its options with their defaults
    (`inspect.Parameter.empty` where there is none).

    known: the names of the tensors that exist.
    kinds: what errors call a name that is not among them.
    what: what the function is, in a word.

    Raises:
        ConfigError: a parameter that is neither.
    """
    inputs, options = [], {}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        article = "an" if what[0] in "aeiou" else "a"
        raise ConfigError(
            f"{origin}: {first_line(error)}; its parameters say what {article} {what} needs, so "
            "give a function that is written in Python"
        ) from error
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[parameter.name] = parameter.default
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(
                f"{origin}: its parameter {parameter} does not say what the {what} needs; "
                f"name tensors out of {', '.join(known)}, and options after a lone *"
            )
        elif parameter.name not in known:
            raise ConfigError(
                f"{origin}: its parameter {parameter.name} is {kinds}; "
                f"{did_you_mean(parameter.name, known)}use {', '.join(known)}; "
                "options come after a lone *"
            )
        else:
            inputs.append(parameter.name)
    return tuple(inputs), options


def bind_options(
    defaults: Mapping[str, Any],
    keys: Mapping[str, Any],
    own: Mapping[str, Any],
    origin: str,
    node: str,
    fallbacks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The options of a function that the config sets.

    Args:
        defaults: the defaults of all options that it takes.
        keys: the options set as `node.key`.
        own: the options set as `node.options.key`; null keeps the default.
        fallbacks: values for options that are not set; those that the function does not take are
            ignored.

    Raises:
        ConfigError: one that it does not take, one that is set twice, one without a value, or one
            that is neither true nor false where its default is one of them.
    """
    for key, path in [(key, f"{node}.{key}") for key in keys] + [
        (key, f"{node}.options.{key}") for key in own
    ]:
        if key not in defaults:
            takes = f"it takes {', '.join(defaults)}" if defaults else "it takes no options"
            raise ConfigError(
                f"{path}={({**keys, **own})[key]}: no option of {origin}; "
                f"{did_you_mean(key, defaults)}{takes}"
            )
        if key in keys and key in own:
            raise ConfigError(
                f"{node}.{key} and {node}.options.{key}: the same option twice; keep one"
            )
    bound = {key: value for key, value in (fallbacks or {}).items() if key in defaults}
    bound |= {**keys} | {
        key: _as_bool(f"{node}.options.{key}", value) if isinstance(defaults[key], bool) else value
        for key, value in own.items()
        if value is not None
    }
    for key, default in defaults.items():
        if default is inspect.Parameter.empty and key not in bound:
            raise ConfigError(
                f"{origin}: its option {key} has no default; set {node}.options.{key}=..."
            )
    return bound


def _as_bool(key: str, value: Any) -> bool:
    """What a typed key would make of a value: true, yes, on and 1 are the same. Otherwise a text
    such as "no" would count as true."""
    if isinstance(value, str) or value in (0, 1):
        with suppress(ValidationError):
            return BooleanNode(None).validate_and_convert(value)
    raise ConfigError(f"{key}={value}: not true or false")
