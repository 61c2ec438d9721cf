"""Trained models: their files, liger, torch.compile, schedules and adapters."""

from omegaconf import DictConfig, ListConfig, OmegaConf

from RL2.config.models import check_model
from RL2.config.schema import keys_of
from RL2.config.schema.actor import LoRAConfig
from RL2.runtime.errors import ConfigError


def check_actor(actor: DictConfig) -> None:
    _check_liger(actor, "actor")
    check_model(actor, "actor")
    _check_trained(actor, "actor")


def check_liger_of_ref(ref_actor: DictConfig) -> None:
    _check_liger(ref_actor, "ref_actor")


def check_liger_of_teacher(teacher: DictConfig) -> None:
    _check_liger(teacher, "teacher")


def check_critic(actor: DictConfig, critic: DictConfig) -> None:
    _check_liger(critic, "critic")
    if critic.model_name != actor.model_name:
        check_model(critic, "critic")
    _check_trained(critic, "critic")
    if critic.avg_level == "correct":
        raise ConfigError(
            "critic.avg_level=correct: a critic learns the values of all samples; use token or "
            "sequence"
        )


def _check_trained(node: DictConfig, group: str) -> None:
    _check_compile(node, group)
    _check_schedule(node, group)
    _check_lora(node, group)


def _check_liger(node: DictConfig, group: str) -> None:
    value = node.use_liger_kernel
    if value not in ("auto", True, False):
        raise ConfigError(f"{group}.use_liger_kernel={value}: must be auto, true or false")


def _check_compile(node: DictConfig, group: str) -> None:
    if node.compile and node.tp_size > 1:
        raise ConfigError(
            f"{group}.compile=true: torch does not compile layers that "
            f"{group}.tp_size={node.tp_size} has split; use one of the two"
        )


def _check_schedule(node: DictConfig, group: str) -> None:
    scheduler, floor, decay = node.scheduler, node.min_lr_ratio, node.decay_ratio
    constant = scheduler in ("constant", "constant_with_warmup")
    if floor > 0 and _is_set(node, "min_lr_ratio") and constant:
        raise ConfigError(
            f"{group}.min_lr_ratio={floor}: has no effect with {group}.scheduler={scheduler}, "
            "which does not fall; use cosine or linear, or leave it out"
        )
    if decay is not None and _is_set(node, "decay_ratio") and scheduler != "warmup_stable_decay":
        raise ConfigError(
            f"{group}.decay_ratio={decay}: has no effect with {group}.scheduler={scheduler}; use "
            "warmup_stable_decay, or leave it out"
        )
    if scheduler == "warmup_stable_decay" and node.warmup_ratio + (decay or 0.1) > 1:
        raise ConfigError(
            f"{group}.warmup_ratio={node.warmup_ratio}: leaves less than {group}.decay_ratio="
            f"{decay or 0.1} of the steps for the decay; lower one of them"
        )
    if scheduler == "polynomial" and floor == 0 and node.lr <= 1e-7:
        raise ConfigError(
            f"{group}.lr={node.lr}: {group}.scheduler=polynomial ends at 1e-7; give "
            f"{group}.min_lr_ratio, the fraction of lr where it shall end"
        )


def _is_set(node: DictConfig, name: str) -> bool:
    """Whether a key has a value of its own; one that follows the actor's is checked there."""
    return not OmegaConf.is_interpolation(node, name)


def _check_lora(node: DictConfig, group: str) -> None:
    lora = node.lora
    unchanged = {name: key.default for name, key in keys_of(LoRAConfig).items()}
    for name in ("alpha", "dropout", "target_modules"):
        if lora.rank is None and lora[name] != unchanged[name] and _is_set(lora, name):
            raise ConfigError(
                f"{group}.lora.{name}={lora[name]}: has no effect without {group}.lora.rank; set "
                "that, such as 16, or leave it out"
            )
    names = lora.target_modules
    names = [*names] if isinstance(names, ListConfig) else [names]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"{group}.lora.target_modules={lora.target_modules}: must be all-linear, or a list of "
            "names of layers such as [q_proj,v_proj]"
        )
    if len(names) > 1 and "all-linear" in names:
        raise ConfigError(
            f"{group}.lora.target_modules={lora.target_modules}: all-linear must be the only name; "
            "leave out that or the others"
        )
    if lora.dropout > 0 and node.tp_size > 1:
        raise ConfigError(
            f"{group}.lora.dropout={lora.dropout}: tensor-parallel ranks would leave out different "
            f"inputs of one adapter; use 0, or {group}.tp_size=1 instead of {node.tp_size}"
        )
