"""Functions that name the groups they read."""

import inspect

from omegaconf import OmegaConf

from RL2.config.checks import CHECKS
from RL2.config.groups import call_each
from RL2.config.schema import SCHEMAS, keys_of


def test_a_function_is_called_where_its_groups_are():
    functions = (lambda a, size: ("a", a.x, size), lambda a, b: "never", lambda size: size)
    config = OmegaConf.create({"a": {"x": 1}, "c": {}})
    assert list(call_each(functions, config, size=3)) == [("a", 1, 3), 3]


def test_every_check_names_groups_that_a_trainer_has():
    """One with a misspelt group would never be called."""
    trainers = [
        {name for name in keys_of(schema) if "." not in name} for schema in SCHEMAS.values()
    ]
    for check in CHECKS:
        wanted = inspect.signature(check).parameters.keys() - {"world_size"}
        assert any(wanted <= groups for groups in trainers), check.__qualname__
