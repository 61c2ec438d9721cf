"""Whether a config is complete: known keys, each with a value in its range."""

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from RL2.config.overrides import is_open, unknown_key_message
from RL2.config.schema import key_types, keys_of
from RL2.runtime.errors import ConfigError


def check_keys(config: DictConfig, schema: type) -> None:
    """Check for unknown keys, which `+key` and yaml files of the user's own can add."""
    known = keys_of(schema)

    def walk(node: dict, prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if is_open(key, key_types(schema)):
                return
            if key == "defaults":
                continue  # a yaml file's own list, where that is loaded without hydra
            if key not in known:
                raise ConfigError(unknown_key_message(key, schema))
            if isinstance(value, dict) and known[key].is_group:
                walk(value, f"{key}.")

    walk(OmegaConf.to_container(config, resolve=False), "")


def check_required(config: DictConfig, schema: type) -> None:
    """Check that the user has given all required keys."""
    for key, entry in keys_of(schema).items():
        group, _, name = key.rpartition(".")
        if entry.required and OmegaConf.is_missing(OmegaConf.select(config, group), name):
            raise ConfigError(f"{key}: required; {entry.required}")


def check_interpolations(node: DictConfig | ListConfig, prefix: str = "") -> None:
    """Check that every key has a value, and that each `${…}` resolves to the right type."""
    raw = OmegaConf.to_container(node, resolve=False)
    for name in raw if isinstance(node, DictConfig) else range(len(raw)):
        key = f"{prefix}{name}"
        if raw[name] == "???":
            raise ConfigError(f"{key}=???: required; give a value, or leave it out for the default")
        try:
            value = node[name]
        except (OmegaConfBaseException, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{key}={raw[name]}: does not resolve ({reason}); name a key that has a value"
            ) from error
        if isinstance(value, (DictConfig, ListConfig)):
            check_interpolations(value, f"{key}.")


def check_ranges(config: DictConfig, schema: type) -> None:
    """Check all values against their ranges."""
    ranges = {key: one.within for key, one in keys_of(schema).items() if one.within is not None}

    def follows(key: str) -> bool:
        group, _, name = key.rpartition(".")
        return OmegaConf.is_interpolation(OmegaConf.select(config, group), name)

    # A key that follows another comes last: the other one is what the user has set.
    for key in sorted(ranges, key=follows):
        value = OmegaConf.select(config, key)
        if value is not None and not ranges[key].holds(value):
            raise ConfigError(f"{key}={value}: {ranges[key]}")
