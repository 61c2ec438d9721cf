import re
from dataclasses import is_dataclass
from enum import EnumType
from typing import get_args

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from RL2.algorithms import LOSSES, resolve_loss
from RL2.config import register_schemas
from RL2.config.flat import flat
from RL2.config.schema import SCHEMAS, key_types, keys_of
from tests.config.support import CONFIG_DIR, compose_config, required

NAMES = sorted(SCHEMAS)
OF_TOKENS = [name for name in NAMES if name not in ("dpo", "rm")]  # with losses of single tokens


@pytest.mark.parametrize("name", NAMES)
def test_type_survives_inheritance(name):
    config = compose_config(name, [])
    assert OmegaConf.get_type(config) is SCHEMAS[name]
    for override in ("actor.lr=abc", "trainer.save_freq=x", "train_data.overlong=no"):
        with pytest.raises(ConfigCompositionException):
            compose_config(name, [override])
    with pytest.raises(ConfigCompositionException):
        compose_config(name, ["actor.nonsense=1"])


@pytest.mark.parametrize("name", NAMES)
def test_yaml_fills_every_key_but_the_required_ones(name):
    config = compose_config(name, [])
    known = key_types(SCHEMAS[name])
    leaves = [key for key, kind in known.items() if not is_dataclass(kind)]
    parts = [key.rpartition(".") for key in leaves]
    missing = {
        f"{group}.{key}"
        for group, _, key in parts
        if OmegaConf.is_missing(OmegaConf.select(config, group), key)
        and not OmegaConf.is_interpolation(OmegaConf.select(config, group), key)
    }
    assert missing == {line.partition("=")[0] for line in required(name)}


@pytest.mark.parametrize("schema", {*SCHEMAS.values()})
def test_every_key_is_explained(schema):
    unsaid = [name for name, key in keys_of(schema).items() if not (key.is_group or key.help)]
    assert unsaid == []


@pytest.mark.parametrize("schema", {*SCHEMAS.values()})
def test_defaults_lie_in_their_range(schema):
    for name, key in keys_of(schema).items():
        if key.within is not None and isinstance(key.default, (int, float)):
            assert key.within.holds(key.default), name


@pytest.mark.parametrize("schema", {*SCHEMAS.values()})
def test_explanations_name_every_choice(schema):
    for name, key in keys_of(schema).items():
        kinds = [one for one in (key.kind, *get_args(key.kind)) if isinstance(one, EnumType)]
        for choice in [] if key.help.startswith("as ") or not kinds else kinds[0]:
            assert re.search(rf"\b{choice}\b", key.help), f"{name}: {choice}"


@pytest.mark.parametrize("name", NAMES)
def test_a_default_stands_once(name):
    """The yaml files hold what the user has to give, and what differs from the schema."""
    node = OmegaConf.load(CONFIG_DIR / f"{name}.yaml")
    node.pop("hydra", None), node.pop("defaults")
    for key, value in flat(OmegaConf.to_container(node)):
        known = keys_of(SCHEMAS[name])[key]
        assert (
            value == "???"
            if known.required and value == known.default
            else (value != known.default)
        ), key


def test_defaults_that_carry_meaning(composed):
    ppo, spo, half, sft = (composed(name) for name in ("ppo", "spo", "spo_0p5", "sft"))
    assert (ppo.adv.estimator, ppo.adv.norm_var, ppo.actor.avg_level) == (
        "reinforce",
        False,
        "token",
    )
    assert (ppo.actor.tis_coef, ppo.actor.clip) == (2.0, 0.2)
    for config in (spo, half):
        assert (config.adv.estimator, config.actor.avg_level) == ("spo", "sequence")
        assert (config.actor.tis_coef, config.actor.clip) == (0.0, None)
    for config in (ppo, spo, half):
        assert (config.actor.lr, config.actor.weight_decay) == (1e-6, 1e-2)
        assert (config.actor.scheduler, config.actor.warmup_ratio) == ("constant", 0.1)
    assert (sft.actor.lr, sft.actor.scheduler, sft.actor.loss.name) == (5e-6, "cosine", "nll")
    assert sft.actor.avg_level == "token"
    for name, config in {"ppo": ppo, "spo": spo, "spo_0p5": half, "sft": sft}.items():
        assert config.actor.use_liger_kernel == "auto"
        assert config.trainer.save_dir == f"ckpts/{name}/default"


def loss_options(config) -> dict:
    names = ("clip_low", "clip_high", "detach_target", "target", "gate", "max_rank")
    loss = config.actor.loss
    return {name: loss[name] for name in names if name in loss and loss[name] is not None}


def test_options_follow_their_loss(composed):
    fixed = {"target": 0.5, "gate": True}
    assert loss_options(composed("ppo")) == {"clip_low": 0.2, "clip_high": 0.2}
    assert loss_options(composed("spo")) == {"detach_target": False}
    assert loss_options(composed("spo_0p5")) == fixed
    assert loss_options(composed("sft")) == {}
    for name in OF_TOKENS:
        assert loss_options(composed(name, "actor.loss.name=fixed_target_kl")) == fixed
        ranked = composed(name, "actor.loss.name=rank_jsd")
        assert loss_options(ranked) == {"detach_target": True, "max_rank": 8}
        assert loss_options(composed(name, "actor.loss.name=max_target_kl")) == {
            "detach_target": False
        }
        assert loss_options(composed(name, "actor.loss.import_path=my_loss.py:my_loss")) == {}
    both = composed("ppo", "actor.clip=0.3", "actor.loss.clip_high=0.4")
    assert loss_options(both) == {"clip_low": 0.3, "clip_high": 0.4}
    assert loss_options(composed("spo", "actor.loss.detach_target=true")) == {"detach_target": True}
    chosen = ("actor.loss.max_rank=4", "actor.loss.detach_target=false")
    assert loss_options(composed("spo", "actor.loss.name=rank_jsd", *chosen)) == {
        "detach_target": False,
        "max_rank": 4,
    }
    own = composed("ppo", "actor.loss.import_path=my_loss.py:my_loss", "actor.loss.max_rank=3")
    assert loss_options(own) == {"max_rank": 3}


@pytest.mark.parametrize("name", ["max_target_kl", "fixed_target_kl", "rank_jsd", "nll"])
@pytest.mark.parametrize("trainer", OF_TOKENS)
def test_every_loss_resolves_under_every_trainer_with_its_own_defaults(composed, trainer, name):
    """What the yaml files give as an option's default is that of the function."""
    written = resolve_loss(composed(trainer, f"actor.loss.name={name}").actor.loss)
    assert written.function.keywords == (LOSSES[name].__kwdefaults__ or {})


def test_token_stats(composed):
    for name in NAMES:
        assert composed(name).actor.token_stats == "auto"
    config = composed("ppo", "actor.token_stats=tiled")
    assert config.ref_actor.token_stats == "tiled"
    assert composed("ppo", "ref_actor.token_stats=naive").actor.token_stats == "auto"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "override",
    [
        "actor.loss.options.beta=0.1",
        "+actor.loss.options.beta=0.1",
        "actor.loss.options={beta:0.1}",
    ],
)
def test_options_of_a_users_loss_are_open(name, override):
    register_schemas()  # a second time does no harm
    assert compose_config(name, [override]).actor.loss.options == {"beta": 0.1}
