"""Keys that name an entry of a registry."""

from RL2.algorithms import ADVANTAGES, LOSSES
from RL2.config.schema import SCHEMAS
from RL2.trainer.registries import REGISTRIES, registry_of
from RL2.trainer.startup.keys import defaults


def test_each_key_is_there_and_its_defaults_are_names():
    given = {trainer: defaults(trainer) for trainer in SCHEMAS}
    for key in REGISTRIES:
        found = [values[key] for values in given.values() if key in values]
        assert found, key
        for value in found:
            names = value.strip("[]").split(",") if value.startswith("[") else [value]
            assert value == "null" or "${" in value or {*names} <= registry_of(key).keys(), key


def test_names_are_those_of_the_registry():
    assert registry_of("actor.loss.name").keys() == LOSSES.keys()
    assert registry_of("adv.estimator") == ADVANTAGES
    assert registry_of("actor.lr") is None
