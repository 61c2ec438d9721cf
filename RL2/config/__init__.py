"""Typed configuration: schemas, checks before anything is built, and `auto` resolved."""

from RL2.config.checks import validate
from RL2.config.fallbacks import apply_fallbacks
from RL2.config.names import check_names
from RL2.config.overrides import check_overrides, composition_error
from RL2.config.paths import expand_argv, expand_paths
from RL2.config.schema import RLConfig, SFTConfig, register_schemas

__all__ = [
    "RLConfig",
    "SFTConfig",
    "apply_fallbacks",
    "check_names",
    "check_overrides",
    "composition_error",
    "expand_argv",
    "expand_paths",
    "register_schemas",
    "validate",
]
