"""Paths in a config: the only place that expands `~` and `~user`, and messages about paths that do
not exist."""

import os
import re
from collections.abc import Sequence

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from RL2.config.schema import all_keys
from RL2.runtime.errors import ConfigError

PATH_KEYS = tuple(name for name, key in all_keys().items() if key.path or key.code)
"""The keys that may name a file or folder, or several."""

_FLAGS = ("--config-dir", "--config-path")  # hydra's

_HOME = re.compile(r"((?:[^/@]*@)?)(~[^/]*)(.*)", re.DOTALL)  # `split@`, `~user`, the rest


def expand_home(path: str, key: str) -> str:
    """`path` with `~` or `~user` expanded to a home folder, at the beginning or after `split@`.

    Raises:
        ConfigError: there is no such user.
    """
    found = _HOME.match(path)
    if found is None:
        return path
    split, home, rest = found.groups()
    folder = os.path.expanduser(home)
    if folder == home:
        raise ConfigError(
            f"{key}={path}: {home} means the home folder of a user, but there is no user "
            f"{home[1:]} here; write the folder itself (./{home} if that is its name)"
        )
    return split + folder + rest


def check_working_directory() -> None:
    """Raise ConfigError if the working directory was removed."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory is gone ({error.strerror}); change to a folder that exists, "
            "with cd, and start again"
        ) from error


def not_there(path: str, kind: str = "file") -> str:
    """The message about a path that is not a `kind` (file or folder)."""
    for other, found in (("folder", os.path.isdir(path)), ("file", os.path.isfile(path))):
        if found and other != kind:
            return f"is a {other}, not a {kind}"
    if os.path.exists(path):
        return f"is a pipe or a device, not a {kind}"
    if os.path.islink(path):
        return f"is a broken link; no such {kind}"
    return f"no such {kind}" + ("" if os.path.isabs(path) else f" in {os.getcwd()}")


def check_folder(key: str, path: str) -> None:
    """Raise ConfigError if `path` can never be a folder, or is a file."""
    if not path.strip() or not path.isprintable() or not _can_exist(path):
        raise ConfigError(
            f"{key}={path}: cannot be a folder; give a path without control characters, such as "
            "runs/first"
        )
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{key}={path}: is a file; give a folder")


def _can_exist(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return True  # other checks report these
    except (OSError, ValueError):
        return False
    return True


def expand_argv(argv: Sequence[str]) -> list[str]:
    """Command-line arguments with `~` expanded in `key=path`.

    The shell does not expand `~` after `=`, and hydra's grammar allows it only in quotes.
    """
    return [_expand_argument(argument) for argument in argv]


def _expand_argument(argument: str) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if name not in (*PATH_KEYS, *_FLAGS) or "~" not in value or value[0] in "'\"":
        return argument
    paths = value.split(",")  # of a sweep, or of a list
    return key + equals + ",".join(_expand_item(path, name) for path in paths)


def _expand_item(text: str, name: str) -> str:
    opens, path, closes = re.fullmatch(r"(\[?)(.*?)(\]?)", text, re.DOTALL).groups()
    return opens + expand_home(path, name) + closes


def expand_paths(config: DictConfig) -> None:
    """Expand `~` in all paths of a config; values that do not resolve are left unchanged."""
    for key in PATH_KEYS:
        try:
            found = OmegaConf.select(config, key)
        except (OmegaConfBaseException, ValueError):
            continue  # later checks report it
        # A key that follows another (`rollout.model_name`) is expanded with that one.
        if isinstance(found, str) and (expanded := expand_home(found, key)) != found:
            OmegaConf.update(config, key, expanded)
        elif isinstance(found, ListConfig):
            paths = [expand_home(path, key) for path in found if isinstance(path, str)]
            if paths != [*found] and len(paths) == len(found):
                OmegaConf.update(config, key, paths)
