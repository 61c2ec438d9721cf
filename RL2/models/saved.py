"""Safe loading of saved models: config.json cannot choose code, and loaded tensors do not stay
mapped to their files."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from RL2.config.model_files import check_quantization
from RL2.runtime.errors import ConfigError

# Entries of a config.json that name unchecked files, or replace layers.
_CHOICES = ("transformers_weights", "fusion_config")


def saved_config(name: str, options: dict[str, Any]) -> PretrainedConfig:
    """The config of a folder or hub id, without its choices of implementations.

    The implementation of attention or experts may be the name of a repository on the hub, whose
    kernels transformers would load and run.

    options: arguments of `from_pretrained`, see `RL2.config.models.hub_options`.

    Raises ConfigError for a quantised model.
    """
    config = AutoConfig.from_pretrained(name, **options)
    _forget_choices(config, name)
    return config


def _forget_choices(config: PretrainedConfig, model: str) -> None:
    # The public setters reach only those parts that a class lists.
    config._attn_implementation_internal = config._experts_implementation_internal = None
    for name in _CHOICES:
        if name in vars(config):
            delattr(config, name)
    quantization = getattr(config, "quantization_config", None)
    check_quantization(quantization, model)
    if quantization:
        # Else a package from the hub decides whether weights are floats, which can be trained.
        config.quantization_config = quantization | {"dequantize": True}
    for part in list(vars(config).values()):
        if isinstance(part, PretrainedConfig):
            _forget_choices(part, model)


def load_whole(
    name: str,
    options: dict[str, Any],
    auto_class: Any = AutoModelForCausalLM,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **built: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with its weights, and transformers' report of the loading, as it fills missing
    weights with noise. Call `own_memory` once the model is on its device.

    Args:
        options: see `RL2.config.models.weight_options`.
        auto_class: the class that builds it.
        settings: entries that replace those of its config.json.
        built: `dtype`, `attn_implementation` and other arguments of `from_pretrained`.

    Raises:
        ConfigError: there is an adapter beside the weights.
        Exception: anything, if a file is broken.
    """
    of_config = {key: value for key, value in options.items() if key != "use_safetensors"}
    config = saved_config(name, of_config)
    for key, value in settings.items():
        setattr(config, key, value)
    model, found = auto_class.from_pretrained(
        name, config=config, output_loading_info=True, **options, **built
    )
    if getattr(model, "_hf_peft_config_loaded", False):  # from the hub: folders are checked earlier
        raise ConfigError(
            f"{name} has full weights and an adapter (adapter_config.json); give a model with "
            "the adapter merged into it, or one without"
        )
    return model, found


def own_memory(model: nn.Module) -> None:
    """Replace each tensor of a model that is in CPU memory by a copy, in place, one by one.

    transformers leaves tensors in their file, mapped into memory: if the file is overwritten, they
    change; if it is truncated, the process is killed.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
