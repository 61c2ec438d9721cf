import pkgutil

import pytest
from omegaconf import OmegaConf

from RL2.config.engines import ENGINES
from RL2.engines.protocol import SamplingParams
from RL2.runtime.errors import ConfigError


def test_sampling_params_are_read_from_config():
    node = OmegaConf.create({"temperature": 0, "max_new_tokens": 5, "stop": "x", "top_p": 0.9})
    assert SamplingParams.from_config(node) == SamplingParams(0.0, 5, ("x",), True, 0.9)
    node = OmegaConf.create(
        {"temperature": 1, "max_new_tokens": 5, "stop": ["x", "y"], "no_stop_trim": False}
    )
    assert SamplingParams.from_config(node) == SamplingParams(1.0, 5, ("x", "y"), False, 1.0)
    node = OmegaConf.create({"temperature": 1.0, "max_new_tokens": 5, "stop": None})
    assert SamplingParams.from_config(node).stop == ()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop": "x"}, "stop='x'"),
        ({"stop": ("",)}, "stop="),
    ],
)
def test_sampling_params_without_meaning_are_refused(wrong, named):
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**{"temperature": 1.0, "max_new_tokens": 4} | wrong)


@pytest.mark.parametrize("kind", ENGINES.values(), ids=ENGINES)
def test_what_makes_each_engine_is_there(kind):
    assert callable(pkgutil.resolve_name(kind.made_by))
