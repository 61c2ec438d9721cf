"""How models and engines are spread: sizes that divide the number of processes."""

from omegaconf import DictConfig

from RL2.runtime.errors import ConfigError


def check_actor(actor: DictConfig, world_size: int) -> None:
    _check_model(actor, "actor", world_size)


def check_ref_actor(ref_actor: DictConfig, world_size: int) -> None:
    _check_model(ref_actor, "ref_actor", world_size)


def check_critic(critic: DictConfig, world_size: int) -> None:
    _check_model(critic, "critic", world_size)


def check_teacher(teacher: DictConfig, world_size: int) -> None:
    _check_model(teacher, "teacher", world_size)


def check_rollout(rollout: DictConfig, world_size: int) -> None:
    _check_divides("rollout.tp_size", rollout.tp_size, world_size)


def _check_model(node: DictConfig, group: str, world_size: int) -> None:
    for name in ("tp_size", "sp_size", "ddp_size"):
        _check_divides(f"{group}.{name}", node[name], world_size)
    for other in ("sp_size", "ddp_size"):
        product = node.tp_size * node[other]
        if world_size % product:
            raise ConfigError(
                f"{group}.tp_size={node.tp_size} * {group}.{other}={node[other]} = {product}: "
                f"must divide world_size={world_size}; lower one of them"
            )


def _check_divides(key: str, size: int, world_size: int) -> None:
    if world_size % size:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        use = " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
        raise ConfigError(f"{key}={size}: must divide world_size={world_size}; use {use}")
