"""LoRA: trained adapters of low rank beside frozen linear layers (peft), and the plain model that
results from merging them.

A layer computes W x + scaling * B A x; only A `[rank, in]` and B `[out, rank]` are trained, in fp32
like all trained weights. Engines and saved models get W + scaling * B A under the plain names, so
no other code needs to know about adapters.
"""

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path

import torch
from omegaconf import ListConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from RL2.models.heads import Head
from RL2.models.loading import local_part, plain_name
from RL2.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_ADAPTER = "default"  # peft's own name for the only adapter
_PART = re.compile(rf"(?P<layer>.+)\.(?P<part>base_layer|lora_A|lora_B)(\.{_ADAPTER})?\.weight")


def add_adapters(model: PreTrainedModel, config, head: type[Head], node: str = "actor") -> None:
    """Put adapters beside the linear layers of a model and freeze all else, in place.

    `init_adapters` must fill them once the model has memory.

    Args:
        model: the whole model, possibly on the meta device.
        config: the `lora` node (rank, alpha, dropout, target_modules).
        head: the head's class; its layer gets no adapter, and is trained in full.
        node: the model's node, which the log names.

    Raises:
        ConfigError: `target_modules` names something that is not a linear layer of the model. Head
            and embedding do not count: the statistics read their weights without any adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model  # optional

    own = model.get_submodule(head.layer) if head.layer else None
    heads = (model.get_output_embeddings(), own)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in heads
    }
    names = sorted({name.rpartition(".")[2] for name in linear})
    targets = config.target_modules
    targets = [*targets] if isinstance(targets, (list, ListConfig)) else [targets]
    if targets == [ALL_LINEAR]:
        targets = names
        _tell_left_out(model, node)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"actor.lora.target_modules={target}: no linear layer of {model.name_or_path} has "
                f"that name, except the head; use {ALL_LINEAR}, or some of {', '.join(names)}"
            )
    on_meta = model.device.type == "meta"
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=[
            name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)
        ],
        # GPT-2's layers keep the transposed weight
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
        task_type=head.task,
        base_model_name_or_path=model.name_or_path,
    )
    # In transformers' mixtures of experts, peft would also apply a layer's name to the experts'
    # fused parameters. Inside a plain module it does not.
    around = nn.Module()
    around.whole = model
    inject_adapter_in_model(adapter, around, _ADAPTER, low_cpu_mem_usage=on_meta)
    model.peft_config = around.peft_config
    if own is not None:
        own.requires_grad_(True)


def _tell_left_out(model: PreTrainedModel, node: str) -> None:
    fused = sorted(
        {
            re.sub(r"\.\d+\.", ".*.", name)
            for name, module in model.named_modules()
            if any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))
            and not isinstance(module, nn.modules.conv._ConvNd)
        }
    )
    if fused:
        logger.info(
            "%s.lora.target_modules=%s: no adapters for %s, whose experts are one tensor, not "
            "linear layers", node, ALL_LINEAR, ", ".join(fused),
        )  # fmt: skip


@torch.no_grad()
def init_adapters(model: PreTrainedModel, seed: int) -> None:
    """Fill the adapters, sharded or not: A as `nn.Linear` does, B with zeros, in place.

    Each tensor is drawn whole from a generator of its own, so that it does not depend on how it is
    spread. Every rank keeps its part.
    """
    for name, parameter in model.named_parameters():
        if plain_name(name) is not None:
            continue
        whole = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(whole[local_part(parameter)])


def merged(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` of the plain model, from the whole tensors of one with adapters.

    Args:
        model: knows the scaling of its adapters. Without adapters the tensors are not changed.
        tensors: `(name, whole tensor)`; those of one layer should be adjacent, as they are held
            until the layer is complete. They are not changed.
    """
    layers: dict[str, dict[str, Tensor]] = {}  # incomplete layers
    for name, tensor in tensors:
        found = _PART.fullmatch(name)
        if found is None:
            yield plain_name(name), tensor
            continue
        layer = found["layer"]
        layers.setdefault(layer, {})[found["part"]] = tensor
        if len(layers[layer]) == 3:
            yield f"{layer}.weight", _merge(model.get_submodule(layer), **layers.pop(layer))


def _merge(layer: nn.Module, base_layer: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    scaling = layer.scaling[_ADAPTER]
    if layer.fan_in_fan_out:
        return torch.addmm(base_layer, lora_A.T, lora_B.T, alpha=scaling)
    return torch.addmm(base_layer, lora_B, lora_A, alpha=scaling)


def has_adapters(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def save_adapters(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters where `PeftModel.from_pretrained(<plain model>, folder)` finds them.

    Args:
        model: the model with adapters.
        tensors: its whole tensors by name.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    adapters = get_peft_model_state_dict(
        model, state_dict={**tensors}, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    # the names in a PeftModel around the model
    adapters = {
        f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()
    }
    folder.mkdir(parents=True)
    save_file(adapters, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    described = copy(model.peft_config[_ADAPTER])
    # a set, whose order is that of this process
    described.target_modules = sorted(described.target_modules)
    described.save_pretrained(folder)
