"""Values that are names out of a registry."""

import pytest
from omegaconf import OmegaConf

from RL2.config import check_names
from RL2.config.names import check_name
from RL2.config.schema import Key
from RL2.runtime.errors import ConfigError
from RL2.trainer.registries import registry_of


@pytest.mark.parametrize("trainer", ["ppo", "spo", "spo_0p5", "sft"])
def test_what_the_trainers_name_is_there(composed, trainer):
    check_names(composed(trainer), registry_of)
    check_names(composed(trainer, "actor.token_stats=auto", "actor.loss.name=nll"), registry_of)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("actor.avg_level", "tokn", "not an avg_level; use token, sequence or correct (did you"),
        ("actor.tis_type", "cut", "not a tis_type; use truncate, mask, sequence_truncate, "),
        ("actor.token_stats", "fused", "not a token_stats; use auto, naive, tiled, compiled,"),
        ("actor.kl.loss_estimator", "low_var_kl", "that is k3; use k1, k2 or k3"),
        ("adv.estimator", "grpo", "GRPO is reinforce with adv.norm_var=true, Dr. GRPO is"),
        ("actor.loss.name", "max_target", "not a loss; use ppo, max_target_kl, fixed_target_kl, "),
        ("actor.loss.name", "dapo", "its clipped loss is ppo, and algorithm=dapo sets all of it"),
    ],
)
def test_what_no_registry_has(composed, key, value, said):
    """As from a yaml file of the user's own, which the command line does not show."""
    with pytest.raises(ConfigError) as caught:
        check_names(composed("ppo", f"{key}={value}"), registry_of)
    assert str(caught.value).startswith(f"{key}={value}: {said}")
    assert "\n" not in str(caught.value)


def test_lists_and_files():
    known, value = ["a", "b"], OmegaConf.create(["a", "my.py:f"])
    check_name("x.things", value, Key(list[str], [], "", code=True), known)
    with pytest.raises(ConfigError, match=r"^x.things=\[a,my.py:f\]: not a thing; use a or b$"):
        check_name("x.things", value, Key(list[str], [], ""), known)
    with pytest.raises(ConfigError, match="use a or b, or my.py:f for your own$"):
        check_name("x.thing", "c", Key(str, "a", "", code=True, own="my.py:f"), known)
