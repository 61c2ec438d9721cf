"""Keys that name an entry of a registry."""

import pytest
from omegaconf import OmegaConf

from RL2.algorithms import ADVANTAGES, LOSSES
from RL2.config.schema import SCHEMAS, keys_of
from RL2.trainer.registries import REGISTRIES, registry_of
from tests.trainer.support import composed


@pytest.mark.parametrize("key", REGISTRIES)
def test_each_key_is_there_and_its_defaults_are_names(key):
    found = [name for name in SCHEMAS if key in keys_of(SCHEMAS[name])]
    assert found
    for trainer in found:
        assert OmegaConf.select(composed(trainer, []), key) in registry_of(key)


def test_names_are_those_of_the_registry():
    assert registry_of("actor.loss.name").keys() == LOSSES.keys()
    assert registry_of("adv.estimator") == ADVANTAGES
    assert registry_of("actor.lr") is None
