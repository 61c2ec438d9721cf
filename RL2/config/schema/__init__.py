"""All keys of the configuration, a file for each group.

Each key's type, default, range and help are given where it is declared (`RL2.config.schema.keys`).
The yaml files of `RL2/trainer/config` define the trainers: they hold the keys that a user must
give, and the defaults that differ from those here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from RL2.config.schema.actor import ActorConfig, SFTActorConfig
from RL2.config.schema.adv import AdvConfig
from RL2.config.schema.critic import CriticConfig
from RL2.config.schema.data import (
    PairDataConfig,
    PromptDataConfig,
    SFTDataConfig,
    TestDataConfig,
)
from RL2.config.schema.keys import Key, group, key_types, keys_of
from RL2.config.schema.model import RefActorConfig, SFTTeacherConfig, TeacherConfig
from RL2.config.schema.preferences import DPOActorConfig, RewardActorConfig
from RL2.config.schema.rollout import RolloutConfig
from RL2.config.schema.trainer import RLTrainerConfig, TrainerConfig

__all__ = [
    "SCHEMAS",
    "DPOConfig",
    "Key",
    "RLConfig",
    "RMConfig",
    "SFTConfig",
    "all_keys",
    "key_types",
    "keys_of",
    "register_schemas",
    "schema_of",
    "structured",
]


@dataclass
class RLConfig:
    """Configuration of `ppo`, `spo` and `spo_0p5`."""

    train_data: PromptDataConfig = group(PromptDataConfig, "the prompts that are trained on")
    test_data: TestDataConfig = group(TestDataConfig, "the prompts that the policy is evaluated on")
    actor: ActorConfig = group(ActorConfig, "the policy that is trained")
    ref_actor: RefActorConfig = group(
        RefActorConfig, "the frozen reference policy of actor.kl; loaded only when that is on"
    )
    critic: CriticConfig = group(
        CriticConfig,
        "the model of values; loaded only for an estimator that names them, such as gae",
    )
    teacher: TeacherConfig = group(
        TeacherConfig, "the frozen model that is distilled; loaded only when model_name is set"
    )
    rollout: RolloutConfig = group(
        RolloutConfig, "the engine that generates, and the environment that rewards"
    )
    adv: AdvConfig = group(AdvConfig, "from rewards to advantages")
    trainer: RLTrainerConfig = group(RLTrainerConfig, "the run, what it saves, and when it stops")


@dataclass
class SFTConfig:
    """Configuration of `sft`."""

    data: SFTDataConfig = group(SFTDataConfig, "prompts with the responses to learn (sft)")
    actor: SFTActorConfig = group(SFTActorConfig, "the model that is trained")
    teacher: SFTTeacherConfig = group(
        SFTTeacherConfig, "the frozen model that is distilled; loaded only when model_name is set"
    )
    trainer: TrainerConfig = group(TrainerConfig, "the run, what it saves, and when it stops")


@dataclass
class DPOConfig:
    """Configuration of `dpo`."""

    data: PairDataConfig = group(PairDataConfig, "pairs, or answers with a label (dpo, rm)")
    actor: DPOActorConfig = group(DPOActorConfig, "the policy that is trained")
    ref_actor: RefActorConfig = group(
        RefActorConfig, "the frozen reference policy; loaded only for losses that have one"
    )
    trainer: TrainerConfig = group(TrainerConfig, "the run, what it saves, and when it stops")


@dataclass
class RMConfig:
    """Configuration of `rm`."""

    data: PairDataConfig = group(PairDataConfig, "pairs of answers")
    actor: RewardActorConfig = group(RewardActorConfig, "the reward model that is trained")
    trainer: TrainerConfig = group(TrainerConfig, "the run, what it saves, and when it stops")


SCHEMAS: dict[str, type] = {
    "ppo": RLConfig,
    "spo": RLConfig,
    "spo_0p5": RLConfig,
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "rm": RMConfig,
}
"""The schema behind each yaml file of `RL2/trainer/config`."""


def all_keys() -> dict[str, Key]:
    """The keys and groups of all trainers; of a key that several have, the first trainer's."""
    found: dict[str, Key] = {}
    for schema in dict.fromkeys(SCHEMAS.values()):
        found |= {name: key for name, key in keys_of(schema).items() if name not in found}
    return found


def schema_of(config: DictConfig) -> type:
    """The schema that a composed config belongs to, by its keys."""
    given = {*_names(config)}

    def fit(schema: type) -> tuple[int, int]:
        known = keys_of(schema).keys()
        return len(known & given), -len(known)

    return max(dict.fromkeys(SCHEMAS.values()), key=fit)


def _names(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys and groups."""
    for name in map(str, config):
        yield prefix + name
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
            yield from _names(node, f"{prefix}{name}.")


def structured(schema: type) -> DictConfig:
    """The schema as a typed config whose user-named options stay open for new keys."""
    config = OmegaConf.structured(schema)
    # hydra closes the whole tree after composition; a flag set here survives that, so that
    # `actor.loss.options.beta=0.1` needs no `+`.
    for name, key in keys_of(schema).items():
        if get_origin(key.kind) is dict:
            OmegaConf.set_struct(OmegaConf.select(config, name), False)
    return config


def _for_loss(*names_and_values: Any, _root_: DictConfig) -> Any:
    values = dict(zip(names_and_values[::2], names_and_values[1::2], strict=True))
    chosen, others = _root_.actor.loss, values.get("others")
    return values.get(chosen.name, others) if chosen.import_path is None else others


def register_schemas() -> None:
    """Register the schemas with hydra, and `${for_loss:name,value,…}` and `${twice:number}` with
    OmegaConf.

    `for_loss` takes loss names, each followed by a value. It resolves to the value of the loss that
    `actor.loss.name` names, else to that of the name `others`, or null, so that an option of one
    loss is not passed to another loss that does not take it. Calling this twice is harmless.
    """
    store = ConfigStore.instance()
    store.store(name="rl_schema", node=structured(RLConfig), provider="RL2")
    store.store(name="sft_schema", node=structured(SFTConfig), provider="RL2")
    store.store(name="dpo_schema", node=structured(DPOConfig), provider="RL2")
    store.store(name="rm_schema", node=structured(RMConfig), provider="RL2")
    OmegaConf.register_new_resolver("for_loss", _for_loss, replace=True)
    OmegaConf.register_new_resolver("twice", lambda number: 2 * number, replace=True)
