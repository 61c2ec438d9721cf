"""Code of the user's own that a config names: `file.py:name` or `package.module:name`."""

from omegaconf import DictConfig, OmegaConf

from RL2.config.schema import all_keys

CODE_KEYS = tuple(name for name, key in all_keys().items() if key.code)
"""The keys that may name such code."""


def user_code(config: DictConfig) -> dict[str, list[str]]:
    """By key, the files and modules that it names: `my_loss.py` of `my_loss.py:my_loss`."""
    found = {}
    for key in CODE_KEYS:
        value = OmegaConf.select(config, key)
        names = [value] if isinstance(value, str) else value or ()
        if places := [name.rpartition(":")[0] for name in names if ":" in name]:
            found[key] = places
    return found


def without_places(value: str | list[str] | None) -> str | list[str] | None:
    """The value of such a key without the place of each file, which may differ by machine."""
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if value is None or ":" not in value:
        return value
    return "a path:" + value.rpartition(":")[2]


def runs_user_code(config: DictConfig) -> bool:
    """Whether code of the user's own runs in the trainer's process."""
    environment = OmegaConf.select(config, "rollout.env_workers") == 0
    return environment or bool(user_code(config)) or config.actor.trust_remote_code
