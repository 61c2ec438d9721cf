"""Types of all configuration keys.

Types only: the values and what each key means stand in `RL2/trainer/config/*.yaml`, so every field
here is `MISSING` until a yaml file fills it. What is still missing after composition is a required
key (`RL2.config.validate` names it).
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


class Overlong(StrEnum):
    error = "error"
    drop = "drop"


class AvgLevel(StrEnum):
    token = "token"
    sequence = "sequence"
    correct = "correct"


class Scheduler(StrEnum):
    """Names of `transformers.get_scheduler` that need no further arguments."""

    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"
    inverse_sqrt = "inverse_sqrt"


class KLType(StrEnum):
    loss = "loss"
    reward = "reward"
    advantage = "advantage"


class KLEstimator(StrEnum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TokenStatsImplementation(StrEnum):
    auto = "auto"
    naive = "naive"
    tiled = "tiled"
    compiled = "compiled"
    triton = "triton"
    triton_fused = "triton_fused"


class EngineName(StrEnum):
    auto = "auto"
    transformers = "transformers"
    sglang = "sglang"
    vllm = "vllm"


class WeightSync(StrEnum):
    auto = "auto"
    tensor = "tensor"
    distributed = "distributed"
    disk = "disk"


class TISType(StrEnum):
    truncate = "truncate"
    mask = "mask"


class Truncated(StrEnum):
    keep = "keep"
    mask = "mask"
    zero = "zero"


class Estimator(StrEnum):
    reinforce = "reinforce"
    spo = "spo"


@dataclass
class PromptDataConfig:
    path: str | None = MISSING
    prompts_per_rollout: int = MISSING
    responses_per_prompt: int = MISSING
    max_prompt_length: int | None = MISSING
    overlong: Overlong = MISSING


@dataclass
class TestDataConfig(PromptDataConfig):
    max_examples: int | None = MISSING


@dataclass
class KLConfig:
    coef: float = MISSING
    type: KLType | None = MISSING
    reward_estimator: KLEstimator = MISSING
    loss_estimator: KLEstimator = MISSING


@dataclass
class EntropyConfig:
    coef: float = MISSING


@dataclass
class LoRAConfig:
    rank: int | None = MISSING
    alpha: int = MISSING
    dropout: float = MISSING
    target_modules: Any = MISSING  # a text or a list of texts; omegaconf has no such union
    seed: int = MISSING


@dataclass
class LossConfig:
    name: str = MISSING
    import_path: str | None = MISSING
    detach_target: bool | None = MISSING
    target: float | None = MISSING
    gate: bool | None = MISSING
    max_rank: int | None = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RLLossConfig(LossConfig):
    clip_low: float | None = MISSING
    clip_high: float | None = MISSING


@dataclass
class ModelConfig:
    """A model spread over the ranks: what the actor and the reference policy share."""

    model_name: str = MISSING
    dtype: Dtype = MISSING
    device: Device = MISSING
    attn_implementation: str = MISSING
    use_liger_kernel: Any = MISSING  # auto, true or false; omegaconf has no such union
    token_stats: TokenStatsImplementation = MISSING
    revision: str | None = MISSING
    trust_remote_code: bool = MISSING
    allow_pickle: bool = MISSING
    ddp_size: int = MISSING
    tp_size: int = MISSING
    sp_size: int = MISSING
    temperature: float = MISSING
    offload_model: bool = MISSING


@dataclass
class TrainedModelConfig(ModelConfig):
    dropout: float | None = MISSING
    gradient_checkpointing: bool = MISSING
    offload_activations: bool = MISSING
    compile: bool = MISSING
    max_length_per_device: int = MISSING
    avg_level: AvgLevel = MISSING
    lr: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    scheduler: Scheduler = MISSING
    warmup_ratio: float = MISSING
    freeze_steps: int = MISSING
    offload_optimizer: bool = MISSING
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class SFTActorConfig(TrainedModelConfig):
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass
class ActorConfig(TrainedModelConfig):
    max_inference_length_per_device: int = MISSING
    update_per_rollout: int = MISSING
    clip: float | None = MISSING
    tis_coef: float = MISSING
    tis_type: TISType = MISSING
    kl: KLConfig = field(default_factory=KLConfig)
    loss: RLLossConfig = field(default_factory=RLLossConfig)


@dataclass
class RefActorConfig(ModelConfig):
    max_inference_length_per_device: int = MISSING


@dataclass
class SamplingConfig:
    temperature: float = MISSING
    max_new_tokens: int = MISSING
    stop: Any = MISSING  # a text, a list of texts or null; omegaconf has no such union
    no_stop_trim: bool = MISSING
    top_p: float = MISSING


@dataclass
class RolloutConfig:
    model_name: str = MISSING
    engine: EngineName = MISSING
    dtype: Dtype = MISSING
    tp_size: int = MISSING
    gpu_memory_utilization: float | None = MISSING
    base_port: int | None = MISSING
    server_url: Any = MISSING  # a text, a list of texts or null; omegaconf has no such union
    server_python: str | None = MISSING
    server_args: list[str] = field(default_factory=list)
    servers_per_node: int | None = MISSING
    server_start_timeout: float = MISSING
    request_timeout: float = MISSING
    request_retries: int = MISSING
    max_restarts: int = MISSING
    weight_sync: WeightSync = MISSING
    weights_dir: str | None = MISSING
    sleep: bool | None = MISSING
    max_batch_size: int = MISSING
    responses_per_prompt: int = MISSING
    max_turns: int = MISSING
    env_path: str = MISSING
    env_timeout: float = MISSING
    env_workers: int | None = MISSING
    max_env_errors: float | None = MISSING
    max_malformed: float | None = MISSING
    max_in_flight: int = MISSING
    truncated: Truncated = MISSING
    dynamic_filtering: bool = MISSING
    max_resampled: int = MISSING
    partial_rollout: bool = MISSING
    over_sampling: int | None = MISSING
    staleness: int = MISSING
    llm_kl_alarm: float | None = MISSING
    train_sampling_params: SamplingConfig = field(default_factory=SamplingConfig)
    test_sampling_params: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class AdvConfig:
    estimator: Estimator = MISSING
    gamma: float = MISSING
    lamda: float = MISSING
    global_norm: bool = MISSING
    norm_var: bool = MISSING


@dataclass
class HealthConfig:
    patience: int = MISSING
    no_signal_steps: int | None = MISSING
    min_entropy: float | None = MISSING
    max_entropy: float | None = MISSING
    max_p_max: float | None = MISSING


@dataclass
class RLHealthConfig(HealthConfig):
    min_length_ratio: float | None = MISSING
    max_llm_kl: float | None = MISSING
    check_versions: bool | None = MISSING


@dataclass
class TrainerConfig:
    project: str = MISSING
    experiment_name: str = MISSING
    load_ckpt_from: str | None = MISSING
    n_epochs: int = MISSING
    max_steps: int | None = MISSING
    save_dir: str = MISSING
    save_freq: int | None = MISSING
    save_dtype: Dtype = MISSING
    keep_last: int | None = MISSING
    async_save: bool = MISSING
    use_wandb: bool = MISSING
    seed: int = MISSING
    max_bad_steps: int = MISSING
    num_threads: int | None = MISSING
    rank_timeout: float | None = MISSING
    health: HealthConfig = field(default_factory=HealthConfig)


@dataclass
class RLTrainerConfig(TrainerConfig):
    test_freq: int | None = MISSING
    test_sampled: bool = MISSING
    keep_best: bool = MISSING
    dump_rollouts: bool = MISSING
    show_samples: int = MISSING
    health: RLHealthConfig = field(default_factory=RLHealthConfig)


@dataclass
class SFTDataConfig:
    path: str = MISSING
    max_length: int = MISSING
    batch_size: int = MISSING
    overlong: Overlong = MISSING
    separator: str = MISSING


@dataclass
class RLConfig:
    """Configuration of `ppo`, `spo` and `spo_0p5`."""

    train_data: PromptDataConfig = field(default_factory=PromptDataConfig)
    test_data: TestDataConfig = field(default_factory=TestDataConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref_actor: RefActorConfig = field(default_factory=RefActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    adv: AdvConfig = field(default_factory=AdvConfig)
    trainer: RLTrainerConfig = field(default_factory=RLTrainerConfig)


@dataclass
class SFTConfig:
    """Configuration of `sft`."""

    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    actor: SFTActorConfig = field(default_factory=SFTActorConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


SCHEMAS: dict[str, type] = {"ppo": RLConfig, "spo": RLConfig, "spo_0p5": RLConfig, "sft": SFTConfig}
"""The schema behind each yaml file of `RL2/trainer/config`."""


@cache
def key_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a dataclass schema with their types; groups map to their dataclass.

    The answer is cached: read it only.
    """
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        types[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            types |= key_types(hint, f"{prefix}{name}.")
    return types


def structured(schema: type) -> DictConfig:
    """The schema as a typed config whose user-named options stay open for new keys."""
    config = OmegaConf.structured(schema)
    # hydra closes the whole tree after composition; a flag set here survives that, so that
    # `actor.loss.options.beta=0.1` needs no `+`.
    OmegaConf.set_struct(config.actor.loss.options, False)
    return config


def _for_loss(*names_and_values: Any, _root_: DictConfig) -> Any:
    values = dict(zip(names_and_values[::2], names_and_values[1::2], strict=True))
    chosen = _root_.actor.loss
    return values.get(chosen.name) if chosen.import_path is None else None


def register_schemas() -> None:
    """Make the schemas known to hydra, and `${for_loss:name,value,…}` to OmegaConf.

    `for_loss` takes names of losses, each followed by a value. It is the value of that which
    `actor.loss.name` names, else null: an option of one loss does not follow the user to another
    loss that does not take it. Calling this twice does no harm.
    """
    store = ConfigStore.instance()
    store.store(name="rl_schema", node=structured(RLConfig), provider="RL2")
    store.store(name="sft_schema", node=structured(SFTConfig), provider="RL2")
    OmegaConf.register_new_resolver("for_loss", _for_loss, replace=True)
