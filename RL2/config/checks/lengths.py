"""Tokens: whether the longest sequence fits the model and one forward."""

from omegaconf import DictConfig

from RL2.config.models import POLICY, context_length
from RL2.runtime.errors import ConfigError


def _longest(actor: DictConfig) -> int:
    return actor.max_length_per_device * actor.sp_size


def _room(actor: DictConfig) -> str:
    """The limit on the longest sequence, in words."""
    times = f" * actor.sp_size={actor.sp_size}" if actor.sp_size > 1 else ""
    return f"actor.max_length_per_device={actor.max_length_per_device}{times}"


def check_context(actor: DictConfig, rollout: DictConfig) -> None:
    context = context_length(actor.model_name)
    for name in ("train_sampling_params", "test_sampling_params"):
        asked = rollout[name].max_new_tokens
        if context is not None and asked >= context:
            raise ConfigError(
                f"rollout.{name}.max_new_tokens={asked}: must be below {context}, the context of "
                f"actor.model_name={actor.model_name}, which holds prompt and response"
            )


def check_responses(actor: DictConfig, rollout: DictConfig, train_data: DictConfig) -> None:
    new, prompt = rollout.train_sampling_params.max_new_tokens, train_data.max_prompt_length
    longest, room = _longest(actor), _room(actor)
    if new >= longest:
        raise ConfigError(
            f"rollout.train_sampling_params.max_new_tokens={new}: must be below {room}, which "
            "holds prompt and response; raise that or lower this"
        )
    if prompt is not None and prompt + new > longest:
        raise ConfigError(
            f"train_data.max_prompt_length={prompt}: with max_new_tokens={new} it exceeds {room}; "
            f"use at most {longest - new}"
        )


def check_inference(actor: DictConfig, ref_actor: DictConfig) -> None:
    _check_room(actor, actor, "actor", "max_inference_length_per_device")
    _check_room(actor, ref_actor, "ref_actor", "max_inference_length_per_device")


def check_teacher(actor: DictConfig, teacher: DictConfig) -> None:
    if teacher.model_name not in (None, POLICY):
        _check_room(actor, teacher, "teacher", "max_inference_length_per_device")


def check_inference_of_critic(actor: DictConfig, critic: DictConfig) -> None:
    for key in ("max_length_per_device", "max_inference_length_per_device"):
        _check_room(actor, critic, "critic", key)


def _check_room(actor: DictConfig, node: DictConfig, group: str, key: str) -> None:
    if node[key] * node.sp_size < _longest(actor):
        times = f" * {group}.sp_size={node.sp_size}" if node.sp_size > 1 else ""
        raise ConfigError(
            f"{group}.{key}={node[key]}{times}: must be at least {_room(actor)}, the longest "
            "sequence; leave it out or raise it"
        )


def check_sft_rows(actor: DictConfig, data: DictConfig) -> None:
    length, context = data.max_length, context_length(actor.model_name)
    if context is not None and length > context:
        raise ConfigError(
            f"data.max_length={length}: must be at most {context}, the context of "
            f"actor.model_name={actor.model_name}"
        )
    if length > _longest(actor):
        raise ConfigError(
            f"data.max_length={length}: must be at most {_room(actor)}; lower this or raise that"
        )
