"""The trained model: its files, liger, torch.compile and adapters."""

from omegaconf import DictConfig, ListConfig

from RL2.config.models import check_model
from RL2.config.schema import keys_of
from RL2.config.schema.actor import LoRAConfig
from RL2.runtime.errors import ConfigError


def check_liger(actor: DictConfig) -> None:
    _check_liger(actor, "actor")


def check_liger_of_ref(ref_actor: DictConfig) -> None:
    _check_liger(ref_actor, "ref_actor")


def _check_liger(node: DictConfig, group: str) -> None:
    value = node.use_liger_kernel
    if value not in ("auto", True, False):
        raise ConfigError(f"{group}.use_liger_kernel={value}: must be auto, true or false")


def check_model_of_actor(actor: DictConfig) -> None:
    check_model(actor, "actor")


def check_compile(actor: DictConfig) -> None:
    if actor.compile and actor.tp_size > 1:
        raise ConfigError(
            "actor.compile=true: torch does not compile layers that "
            f"actor.tp_size={actor.tp_size} has split; use one of the two"
        )


def check_schedule(actor: DictConfig) -> None:
    scheduler, floor, decay = actor.scheduler, actor.min_lr_ratio, actor.decay_ratio
    if floor > 0 and scheduler in ("constant", "constant_with_warmup"):
        raise ConfigError(
            f"actor.min_lr_ratio={floor}: has no effect with actor.scheduler={scheduler}, which "
            "does not fall; use cosine or linear, or leave it out"
        )
    if decay is not None and scheduler != "warmup_stable_decay":
        raise ConfigError(
            f"actor.decay_ratio={decay}: has no effect with actor.scheduler={scheduler}; use "
            "warmup_stable_decay, or leave it out"
        )
    if scheduler == "warmup_stable_decay" and actor.warmup_ratio + (decay or 0.1) > 1:
        raise ConfigError(
            f"actor.warmup_ratio={actor.warmup_ratio}: leaves less than actor.decay_ratio="
            f"{decay or 0.1} of the steps for the decay; lower one of them"
        )
    if scheduler == "polynomial" and floor == 0 and actor.lr <= 1e-7:
        raise ConfigError(
            f"actor.lr={actor.lr}: actor.scheduler=polynomial ends at 1e-7; give "
            "actor.min_lr_ratio, the fraction of lr where it shall end"
        )


def check_lora(actor: DictConfig) -> None:
    lora = actor.lora
    unchanged = {name: key.default for name, key in keys_of(LoRAConfig).items()}
    for name in ("alpha", "dropout", "target_modules"):
        if lora.rank is None and lora[name] != unchanged[name]:
            raise ConfigError(
                f"actor.lora.{name}={lora[name]}: has no effect without actor.lora.rank; set that, "
                "such as 16, or leave it out"
            )
    names = lora.target_modules
    names = [*names] if isinstance(names, ListConfig) else [names]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"actor.lora.target_modules={lora.target_modules}: must be all-linear, or a list of "
            "names of layers such as [q_proj,v_proj]"
        )
    if len(names) > 1 and "all-linear" in names:
        raise ConfigError(
            f"actor.lora.target_modules={lora.target_modules}: all-linear must be the only name; "
            "leave out that or the others"
        )
    if lora.dropout > 0 and actor.tp_size > 1:
        raise ConfigError(
            f"actor.lora.dropout={lora.dropout}: tensor-parallel ranks would leave out different "
            f"inputs of one adapter; use 0, or actor.tp_size=1 instead of {actor.tp_size}"
        )
