"""Check of the command line before hydra composes it.

For an unknown key hydra itself advises `+key=value`, which silently adds the key. Here an unknown
key is an error that names similar keys.
"""

import argparse
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

# The parser of hydra's own flags is not public, and a copy of it here would become outdated.
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from RL2.config.elsewhere import key_here
from RL2.config.flat import as_text
from RL2.config.names import RegistryOf, advice, check_name, listing
from RL2.config.presets import CHOICES, GROUP, check_preset, left_over
from RL2.config.schema import SCHEMAS, all_keys, key_types, keys_of, schema_of, structured
from RL2.runtime.errors import ConfigError
from RL2.runtime.secrets import HIDDEN, is_secret_name, redact

# Lines of hydra's messages that begin like this are left out.
_OMITTED_LINES = (
    "full_key:", "object_type=", "reference_type=", "To append", "See ", "Config search path",
    "provider=", "Available options",
)  # fmt: skip

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_overrides(config_name: str, argv: Sequence[str], registry_of: RegistryOf) -> list[str]:
    """Check the hydra overrides of a command line against the schema of `config_name`.

    Returns the command line with the overrides first: hydra accepts no flag between them. Before
    them come those that take back what presets leave over (`RL2.config.presets.left_over`).

    Args:
        config_name: a yaml file of `RL2/trainer/config`, without its extension.
        argv: the arguments after the module; hydra's flags and its own keys (`hydra.…`) pass.
        registry_of: finds the registry of a key; called once all other checks have passed.

    Raises:
        ConfigError: an override that does not parse, an unknown key (added with `+` or not), a
            deleted key, a sweep without `--multirun`, a value of the wrong type, or a name that
            its registry does not have.
    """
    for line in argv:
        _check_secret(line)
    parser = get_args_parser()
    parser.exit_on_error = False  # argparse would write its usage over many lines
    try:
        flags, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; --hydra-help lists the flags of hydra") from error
    for line in rest:
        if line.startswith("-"):
            raise ConfigError(
                f"{line}: unknown flag; a key is set by key=value without dashes{_of_flag(line)}, "
                "and --help lists the keys"
            )
    # A user's own yaml file has the keys of the trainer that it is for.
    config_name = flags.config_name if flags.config_name in SCHEMAS else config_name
    lines = flags.overrides + rest
    overrides = [_parse(line) for line in lines]
    sweeps = flags.multirun or any(line.startswith("hydra.mode=MULTIRUN") for line in lines)
    schema = SCHEMAS[config_name]
    typed = structured(schema)
    ours = [
        override
        for override in overrides
        if not override.is_hydra_override() and not _is_users_group(override, flags.config_dir)
    ]
    for override in [one for one in ours if _key_of(one) == GROUP]:
        _check_preset(override, config_name, sweeps)
        ours.remove(override)
    for override in ours:
        _check(override, schema, typed, sweeps)
    for override in ours:
        for value in _values(override):
            _check_names(_key_of(override), value, schema, registry_of)
    others = list(argv)
    for line in lines:
        others.remove(line)
    back = [f"{key}={as_text(value)}" for key, value in _left_over(overrides, typed).items()]
    return back + lines + others


def take_back(config: DictConfig, lines: Sequence[str]) -> None:
    """Give the options that presets leave over their defaults, in place: in one run of a sweep, for
    which `check_overrides` cannot, as each run may have others. lines: the overrides of the run."""
    typed = structured(schema_of(config))
    for key, value in _left_over([_parse(line) for line in lines], typed).items():
        OmegaConf.update(config, key, value)


def composition_error(error: Exception, config_name: str) -> ConfigError:
    """Hydra's message of many lines about a yaml file or an override, in one line.

    config_name: the trainer's config, whose schema has the known keys.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keys = [line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")]
    file = re.match(r"In '(.+?)':", lines[0] if lines else "")
    where = f" (in {file[1]}.yaml)" if file else ""
    if keys and keys[0] and keys[0] not in key_types(SCHEMAS[config_name]):
        return ConfigError(unknown_key_message(keys[0], SCHEMAS[config_name], keys[0] + where))
    # Without search paths, class names, and the advice to use `+key`.
    said = [line for line in lines if not line.startswith(_OMITTED_LINES)][:3]
    key = f"{keys[0]}{where}: " if keys and keys[0] else ""
    return ConfigError(
        f"{key}the configuration cannot be composed ({' '.join(said) or type(error).__name__}); "
        "correct that, or leave it out; a yaml file of your own begins with "
        f"`defaults: [{config_name}, _self_]`"
    )


def unknown_key_message(key: str, schema: type, shown: str | None = None) -> str:
    """The message about a key that the schema does not have: `shown: unknown key; …`."""
    return f"{shown or key}: unknown key; {_advice(key, schema)}"


def is_open(key: str, known: dict[str, Any]) -> bool:
    """Whether a key is inside a dict whose keys the user chooses."""
    return any(typing.get_origin(known.get(parent)) is dict for parent in _parents(key))


def _check_secret(line: str) -> None:
    """Reject secrets: `ps` shows the command line to all users of the machine."""
    name, _, value = line.partition("=")
    if redact(line) != line or (value not in ("", "null") and is_secret_name(name)):
        shown = redact(line) if redact(line) != line else f"{name}={HIDDEN}"
        raise ConfigError(
            f"{shown}: a secret on the command line, where all users of the machine see it; put it "
            "into an environment variable, such as RL2_SERVER_KEY or WANDB_API_KEY"
        )


def _of_flag(line: str) -> str:
    """The key here for a command-line option of another program, in parentheses."""
    here = key_here(line.lstrip("-").partition("=")[0], all_keys().keys())
    return f" ({here})" if here else ""


def _parse(line: str) -> Override:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{line}: not an override ({reason}); write key=value, and quote a value with special "
            "characters: 'key=\"value\"'"
        ) from error


def _is_users_group(override: Override, config_dir: str | None) -> bool:
    return config_dir is not None and Path(config_dir, override.key_or_group).is_dir()


def _key_of(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _check_names(key: str, value: Any, schema: type, registry_of: RegistryOf) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_names(f"{key}.{name}", inner, schema, registry_of)
    elif (entry := keys_of(schema).get(key)) is not None and "${" not in str(value):
        if (known := registry_of(key)) is not None:
            check_name(key, value, entry, known)


def _check_preset(override: Override, trainer: str, sweeps: bool) -> None:
    line = override.input_line
    if override.is_add():
        raise ConfigError(f"{line}: the group exists already; leave out the +")
    if override.is_delete():
        raise ConfigError(f"{line}: an algorithm cannot be removed; leave it out")
    _check_sweep(override, sweeps)
    for value in _values(override):
        for name in value if isinstance(value, list) else [value]:
            check_preset(name, trainer)


def _left_over(overrides: Sequence[Override], typed: DictConfig) -> dict[str, Any]:
    """The default of each option that presets leave over; none in a sweep of them, which has other
    ones for each of its runs."""
    values = {_key_of(one): None if one.is_sweep_override() else one.value() for one in overrides}
    names = values.pop(GROUP, None)
    if names is None or any(key in values and values[key] is None for key in CHOICES):
        return {}
    names = names if isinstance(names, list) else [names]
    found = {}
    for key in left_over(names, {key: str(value) for key, value in values.items()}):
        group, _, name = key.rpartition(".")
        found[key] = OmegaConf.to_container(OmegaConf.select(typed, group), resolve=False)[name]
    return found


def _check_sweep(override: Override, sweeps: bool) -> None:
    if override.is_sweep_override() and not sweeps:
        key, line = _key_of(override), override.input_line
        raise ConfigError(
            f"{line}: several values need a sweep; add --multirun, or quote a text with commas: "
            f"'{key}=\"{override.get_value_string()}\"'"
        )


def _check(override: Override, schema: type, typed: DictConfig, sweeps: bool) -> None:
    key, line = _key_of(override), override.input_line
    known = key_types(schema)
    if key not in known and not is_open(key, known):
        raise ConfigError(unknown_key_message(key, schema, line))
    if override.is_add() and not is_open(key, known):
        raise ConfigError(f"{line}: the key exists already; leave out the +")
    if override.is_delete():
        if is_open(key, known):
            return
        raise ConfigError(f"{line}: a key cannot be removed; set it to a value instead")
    _check_sweep(override, sweeps)
    for value in _values(override):
        _check_value(key, value, schema, typed, line)


def _values(override: Override) -> Iterator[Any]:
    """The value of an override, or those that a sweep lists; an interval lists none."""
    if not override.is_sweep_override():
        yield override.value()
    elif override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
        for value in override.sweep_iterator():
            yield value.text if isinstance(value, QuotedString) else value


def _check_value(
    key: str, value: Any, schema: type, typed: DictConfig, line: str | None = None
) -> None:
    line, known = line or f"{key}={value}", key_types(schema)
    if isinstance(value, str) and "${" in value:
        return  # hydra resolves it, and checks the type then
    if is_open(key, known):
        return
    kind = known[key]
    if isinstance(value, dict) and is_dataclass(kind):
        for name, inner in value.items():
            path = f"{key}.{name}"
            if path not in known and not is_open(path, known):
                raise ConfigError(unknown_key_message(path, schema, f"{path}={inner}"))
            _check_value(path, inner, schema, typed)
        return
    if is_dataclass(kind):
        raise ConfigError(f"{line}: {key} is a group; set one of its keys: {_keys_of(key, known)}")
    # omegaconf accepts any number as true
    takes_bool = kind is bool or bool in typing.get_args(kind)
    number = takes_bool and isinstance(value, (int, float)) and value not in (0, 1)
    if number or not _fits(typed, key, value):
        raise ConfigError(f"{line}: {_type_advice(key, kind, value)}")


def _fits(config: DictConfig, key: str, value: Any) -> bool:
    try:
        OmegaConf.update(config, key, value, merge=True)
    except (OmegaConfBaseException, ValueError):
        return False
    return True


def _type_advice(key: str, kind: Any, value: Any) -> str:
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    null = " or null" if type(None) in members else ""
    member = members[0]
    if value is None:
        return f"must not be null; give {_kind(member)}"
    if member is int and isinstance(value, float) and value.is_integer():
        return f"not {_kind(member)}{null} as it is written; use {key}={int(value)}"
    if not (isinstance(member, type) and issubclass(member, Enum)):
        return f"not {_kind(member)}{null}"
    return advice(key, value, [one.value for one in member] + ["null"] * bool(null))


def _kind(member: Any) -> str:
    if typing.get_origin(member) is dict:
        return "a mapping {name: value}"
    if typing.get_origin(member) is list:
        numbers = typing.get_args(member) == (float,)
        return "a list of numbers [0.9,0.99]" if numbers else "a list of texts [one,two]"
    if isinstance(member, type) and issubclass(member, Enum):
        return listing([one.value for one in member], "or")
    return _KINDS[member]


def _advice(key: str, schema: type) -> str:
    group, _, name = key.rpartition(".")
    known = key_types(schema)
    if (here := key_here(key, known)) is not None:
        return here
    if group in ("actor.loss", "adv") and f"{group}.options" in known:
        close = difflib.get_close_matches(key, [one for one in known if group in one], n=1)
        mean = f"did you mean {close[0]}? " if close else ""
        what = "loss" if group == "actor.loss" else "estimator"
        return f"{mean}an option of your own {what} is {group}.options.{name}"
    leaves = [one for one, kind in known.items() if not is_dataclass(kind)]
    names = {one.rpartition(".")[2] for one in leaves}
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.75)
    by_name = [one for one in leaves if one.rpartition(".")[2] in close]
    # Keys of the same group alone, if there are any: a slip in the name is likelier than one in the
    # group.
    by_name = [one for one in by_name if one.rpartition(".")[0] == group] or by_name
    by_path = difflib.get_close_matches(key, leaves, n=1, cutoff=0.8)
    suggestions = list(dict.fromkeys([*by_path, *by_name]))[:3]
    if suggestions:
        return f"did you mean {listing(suggestions, 'or')}?"
    parent = next((one for one in _parents(key) if one in known), None)
    if parent is None:
        return f"the groups are {listing([one for one in known if '.' not in one], 'and')}"
    return f"the keys of {parent} are {_keys_of(parent, known)}"


def _keys_of(group: str, known: dict[str, Any]) -> str:
    prefix = f"{group}."
    inner = [one.removeprefix(prefix) for one in known if one.startswith(prefix)]
    return listing([one for one in inner if "." not in one], "and")


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
