"""The keys of every model that is spread over the ranks, of `ref_actor` and of `teacher`."""

from dataclasses import dataclass
from typing import Any

from RL2.config.schema.choices import Device, Dtype
from RL2.config.schema.keys import (
    ABOVE_ZERO,
    FROM_ONE,
    FROM_ZERO,
    PROBABILITY,
    follow,
    key,
    required,
)


@dataclass
class ModelConfig:
    """A model spread over the ranks: what the actor and the reference policy share."""

    model_name: str = required(
        "a folder made by save_pretrained, or a hub id such as Qwen/Qwen3-4B-Thinking-2507",
        "folder made by save_pretrained, or hub id (org/name)",
        path=True,
    )
    dtype: Dtype = key(
        Dtype.auto,
        "dtype of the forward pass: auto | float32 | bfloat16; auto: the checkpoint's on CUDA "
        "(bfloat16 for float16), float32 on CPU",
    )
    device: Device = key(Device.auto, "auto | cpu | cuda; auto: CUDA where there is one")
    attn_implementation: str = key(
        "auto",
        "attention implementation of transformers; auto: flash_attention_2 on CUDA with "
        "flash-attn, else sdpa_varlen (part of RL2)",
    )
    use_liger_kernel: Any = key(
        "auto",
        "fused CUDA kernels of liger-kernel: auto | true | false; auto: on CUDA where it is "
        "installed, but not with compile",
        takes="auto, true or false",
    )
    token_stats: str = key(
        "auto",
        "how the head's statistics are computed; auto takes the fastest",
    )
    revision: str | None = key(None, "commit of a hub id, 40 hex digits; null: the newest")
    trust_remote_code: bool = key(
        False, "run Python code that comes with the model; code from the hub needs a revision"
    )
    allow_pickle: bool = key(
        False,
        "load pickled weights (*.bin) where there are no safetensors; loading them can run code",
    )
    ddp_size: int = key(1, "copies of the sharded model (ranks / ddp_size share one)", FROM_ONE)
    tp_size: int = key(
        1,
        "tensor-parallel ranks: layers, embedding and head are split over this many",
        FROM_ONE,
    )
    sp_size: int = key(1, "sequence-parallel ranks: a sequence is split over this many", FROM_ONE)
    temperature: float = key(1.0, "divides the logits", ABOVE_ZERO)
    offload_model: bool = key(False, "keep weights in CPU memory while they are not used (CUDA)")


@dataclass
class FrozenConfig(ModelConfig):
    """A model that is not trained, as the actor unless its keys say otherwise."""

    model_name: str = follow("actor.model_name", "folder or hub id", path=True)
    dtype: Dtype = follow("actor.dtype")
    device: Device = follow("actor.device")
    attn_implementation: str = follow("actor.attn_implementation")
    use_liger_kernel: Any = follow("actor.use_liger_kernel", takes="auto, true or false")
    token_stats: str = follow("actor.token_stats")
    revision: str | None = follow(
        "actor.revision", "as actor.revision; set it if the model is a different one"
    )
    trust_remote_code: bool = follow("actor.trust_remote_code")
    allow_pickle: bool = follow("actor.allow_pickle")
    ddp_size: int = follow("actor.ddp_size", within=FROM_ONE)
    tp_size: int = follow("actor.tp_size", within=FROM_ONE)
    sp_size: int = follow("actor.sp_size", within=FROM_ONE)
    temperature: float = follow("actor.temperature", within=ABOVE_ZERO)
    offload_model: bool = follow("actor.offload_model")
    max_inference_length_per_device: int = follow(
        "actor.max_inference_length_per_device", "tokens in one forward", FROM_ONE
    )


@dataclass
class RefActorConfig(FrozenConfig):
    """The frozen policy that actor.kl compares with."""

    renew_every: int = key(
        0, "after every so many training steps it is replaced by the actor; 0: never", FROM_ZERO
    )
    renew_mix: float = key(
        1.0,
        "share of the actor in what replaces it; the rest is the reference before",
        PROBABILITY,
    )


@dataclass
class SFTTeacherConfig(FrozenConfig):
    """The frozen model whose distribution the actor learns."""

    model_name: str | None = key(
        None,
        "folder or hub id of a model with the actor's vocabulary; null: no teacher",
        path=True,
    )
    revision: str | None = key(None, "commit of a hub id, 40 hex digits; null: the newest")
    temperature: float = key(1.0, "divides the teacher's logits", ABOVE_ZERO)
    max_inference_length_per_device: int = follow(
        "actor.max_length_per_device", "tokens in one forward", FROM_ONE
    )
    top_k: int | None = key(
        None,
        "how many of the teacher's most likely tokens losses such as topk_kl see at each position; "
        "null: 64",
        FROM_ONE,
    )


@dataclass
class TeacherConfig(SFTTeacherConfig):
    model_name: str | None = key(
        None,
        "folder or hub id of a model with the actor's vocabulary; policy: the actor itself, with "
        "teacher.context; null: no teacher",
        path=True,
    )
    temperature: float = follow(
        "actor.temperature", "divides the teacher's logits", within=ABOVE_ZERO
    )
    max_inference_length_per_device: int = follow(
        "actor.max_inference_length_per_device", "tokens in one forward", FROM_ONE
    )
    context: str | None = key(
        None,
        "another prompt for the teacher, before the same responses: a text with {prompt} and names "
        "of extra_info such as {answer}; takes the place of the last message's content",
    )
    import_path: str | None = key(
        None,
        "your own function (prompt, extra_info) -> prompt (file.py:function or "
        "package.module:function), used instead of context",
        code=True,
    )
