"""Configs of the trainers, in a folder that holds the files they name."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from RL2.config import validate
from RL2.runtime.errors import ConfigError
from tests.config.support import quick_config


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty working directory with an environment `env.py`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env.py").write_text("async def step(state, action, extra_info): ...\n")
    return tmp_path


@pytest.fixture
def composed(workdir) -> Callable[..., DictConfig]:
    """`composed("spo", "key=value", …)`: the required keys, then the overrides."""
    return lambda name, *overrides: quick_config(name, list(overrides))


@pytest.fixture
def message(composed) -> Callable[..., str]:
    """`message("spo", "key=value", world_size=8)`: what `validate` says about the config."""

    def check(name: str, *overrides: str, world_size: int = 1) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(composed(name, *overrides), world_size)
        text = str(caught.value)
        assert "\n" not in text
        return text

    return check
