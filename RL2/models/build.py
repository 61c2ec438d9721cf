"""Build a model with a head, to be split, sharded and then filled, and set how its layers run."""

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from RL2.config.models import hub_options, weight_options
from RL2.distributed.sequence_parallel import check_heads, register_sequence_parallel
from RL2.models.dtypes import Dtypes, find_dtypes, resolve_attention
from RL2.models.headed_model import HeadedModel
from RL2.models.heads import Head, TokenStatsHead
from RL2.models.loading import holds_all, weight_files
from RL2.models.lora import add_adapters
from RL2.models.saved import load_whole, saved_config
from RL2.ops.attention import check_attention, check_rope, register_attention
from RL2.ops.fp32 import accelerate_linears
from RL2.runtime.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

_DROPOUT = re.compile(r"^(?!.*(classif|summary|pooler)).*(drop|jitter)")


def load_model(
    config, *, train: bool, head: type[Head] = TokenStatsHead, node: str = "actor"
) -> tuple[HeadedModel, Dtypes, dict[str, Path] | None]:
    """Build `config.model_name` with fp32 weights, to be split, sharded and then filled.

    Args:
        config: an `actor` or `ref_actor` node (model_name, dtype, attn_implementation, …).
        train: whether gradients will be needed (decides on gradient checkpointing).
        head: the head's class, which defines what the model computes.
        node: the name of that node, for the log.

    Returns:
        The model, the dtypes that it computes and is stored in, and the files from which
        `RL2.models.loading.materialize` reads its weights; the model is then on the meta device.
        None in place of the files: the model already holds its weights.

    Raises:
        ConfigError: the model cannot be loaded, or not be spread as the config says.
    """
    name, options = config.model_name, hub_options(config)
    try:
        saved = saved_config(name, options)
    except ConfigError as error:
        raise ConfigError(f"actor.model_name={error}") from error
    except Exception as error:  # a broken file can make it raise anything
        raise _not_loadable(name, head, error) from error
    try:
        files = weight_files(name, config.revision)
        dtypes = find_dtypes(str(config.dtype), saved, files)
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _not_loadable(name, head, error) from error
    if train and dtypes.compute != dtypes.stored == torch.float16 and config.dtype == "auto":
        logger.warning(
            "%s.dtype=auto: %s is stored in float16, and training in float16 would need loss "
            "scaling; computing in bfloat16", node, name,
        )  # fmt: skip
    asked = resolve_attention(config.attn_implementation, dtypes.compute)
    check_attention(saved)
    check_rope(saved, config)
    if train and getattr(saved.get_text_config(), "output_router_logits", None):
        logger.warning(
            "%s.model_name: %s has output_router_logits=true, for an auxiliary loss of the "
            "routers; that loss is not used here", node, saved.model_type,
        )  # fmt: skip
    if config.sp_size > 1:
        check_heads(saved, config.sp_size, config.tp_size)
        attention = register_sequence_parallel(asked)
    else:
        attention = register_attention(asked)
    built = {"dtype": torch.float32, "attn_implementation": attention}
    try:
        model = _on_meta(saved, config, head, built)
    except Exception as error:  # invalid numbers can make the model's class raise anything
        check_buildable(saved, config, head, asked, error)
        raise _not_loadable(name, head, error) from error
    answers = head(model, config)
    try:
        if not holds_all(files, model, new := _new_weights(model, head)):
            model, files = _load_whole(config, head, built, new), None
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _not_loadable(name, head, error) from error
    if files is not None:
        try:
            model.generation_config = GenerationConfig.from_pretrained(
                name, revision=config.revision
            )
        except OSError:  # not every checkpoint has one
            pass
        except Exception as error:  # as above
            raise _not_loadable(name, head, error) from error
    if config.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    if train and config.lora.rank is not None:
        add_adapters(model, config.lora, head, node)
    if not (train and config.compile):
        accelerate_linears(model if head.layer is None else model.base_model)
    offload = train and config.offload_activations
    return HeadedModel(model, answers, offload), dtypes, files


def check_dropout(model_config: PretrainedConfig, config) -> None:
    """Raise ConfigError if tensor-parallel ranks would drop out different things."""
    own = dropout_of(model_config)
    if config.dropout is None and config.tp_size > 1 and own:
        name, value = next(iter(own.items()))
        raise ConfigError(
            f"actor.dropout=null: {model_config.model_type} has {name}={value}, and tensor-parallel"
            " ranks would drop different parts of the same activations; use actor.dropout=0, or "
            f"actor.tp_size=1 instead of {config.tp_size}"
        )


def check_buildable(
    saved: PretrainedConfig, config, head: type[Head], asked: str, error: Exception
) -> None:
    """Raise ConfigError if the model can be built with another attention."""
    others = []
    for other in ("sdpa", "eager"):
        with suppress(Exception):  # the class may raise anything
            _on_meta(saved, config, head, {"dtype": torch.float32, "attn_implementation": other})
            others.append(other)
    if others and asked not in others:
        raise ConfigError(
            f"actor.attn_implementation={asked}: {saved.model_type} cannot be "
            f"built with it ({first_line(error)}); try {' or '.join(others)}, or a model of "
            "another family"
        ) from error


def _on_meta(saved: PretrainedConfig, config, head: type[Head], options: dict) -> PreTrainedModel:
    """The model on the meta device, without memory."""
    for name, value in head.settings.items():
        setattr(saved, name, value)
    options = options | {"trust_remote_code": config.trust_remote_code}
    code = getattr(saved, "auto_map", {})
    if config.revision is not None and head.auto_class.__name__ in code:
        options |= {"code_revision": config.revision}  # only code from the hub takes it
    with torch.device("meta"):
        return head.auto_class.from_config(saved, **options)


def _new_weights(model: PreTrainedModel, head: type[Head]) -> set[str]:
    """Names of the head's weights, which a checkpoint may lack."""
    if not isinstance(getattr(model, head.layer or "", None), nn.Module):
        return set()
    return {
        f"{head.layer}.{name}" for name, _ in model.get_submodule(head.layer).named_parameters()
    }


def _load_whole(config, head: type[Head], options: dict, new: set[str]) -> PreTrainedModel:
    """The model with its weights, read by transformers, which fills missing ones with noise."""
    name = config.model_name
    options = options | {"auto_class": head.auto_class, "settings": head.settings}
    model, found = load_whole(name, weight_options(config), ignore_mismatched_sizes=True, **options)
    for weight in new & {*found["missing_keys"]}:
        nn.init.zeros_(model.get_parameter(weight))
    way_out = "; give the folder of a whole model, config.json and weights of one save_pretrained"
    if missing := sorted({*found["missing_keys"]} - new):
        raise ConfigError(
            f"actor.model_name={config.model_name}: its files lack {len(missing)} of the model's "
            f"weights, such as {missing[0]}{way_out}"
        )
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"actor.model_name={config.model_name}: {name} has the shape {list(stored)}, the model "
            f"expects {list(wanted)}{way_out}"
        )
    return model


def compile_layers(model: PreTrainedModel, layer_classes: set[str], checkpointing: bool) -> None:
    """`torch.compile` the forward of every layer whose class is named in `layer_classes`, in place;
    with `checkpointing`, also recompute it in backward.
    """
    for layer in model.modules():
        if type(layer).__name__ in layer_classes:
            plain = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
            # dynamic: packs differ in length
            forward = torch.compile(plain.__get__(layer), dynamic=True)
            if checkpointing:
                forward = partial(_recomputed, forward)
            layer.forward = forward


def checkpoint_layers(model: PreTrainedModel, layer_classes: set[str]) -> None:
    """Recompute layers in backward instead of keeping their activations, in place.

    transformers' own switch works only in training mode, which also turns dropout on. It is inside
    the forward, where torch's compiler gives up on the whole layer.
    """
    done: tuple[str, ...] = ()
    for name, layer in model.named_modules():
        is_layer = isinstance(layer, GradientCheckpointingLayer)
        if (is_layer or type(layer).__name__ in layer_classes) and not name.startswith(done):
            layer.forward = partial(_recomputed, layer.forward)
            done += (f"{name}.",)


def _recomputed(forward: Callable, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def start_updates(model: nn.Module, dropout: float | None) -> None:
    """Put a model into the mode for updates.

    Without dropout that is evaluation mode: dropout and noise, whatever a family calls them, only
    happen in training mode. Adapters' dropout has a key of its own.
    """
    model.train(dropout is None)
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train()


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """The entries of a model's config about dropout and noise in its layers."""
    return {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if _DROPOUT.search(name) and isinstance(value, float) and value > 0
    }


def _not_loadable(name: str, head: type[Head], error: Exception) -> ConfigError:
    return ConfigError(
        f"actor.model_name={name}: cannot be loaded as {head.kind} "
        f"({first_line(error)}); give a folder made by save_pretrained or a model id"
    )


def attention_cost(model: PreTrainedModel) -> float:
    """The relative cost of attention: a sequence of n tokens takes n + attention_cost * n^2
    multiplications, in units of those that the weights take for one token.

    A causal layer multiplies each token's query with n/2 keys on average and as many values:
    2 * heads * head_dim * n/2 multiplications per token, against one per weight.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    embedding = model.get_input_embeddings().weight.numel()
    n_weights = sum(p.numel() for p in model.parameters()) - embedding
    return config.num_hidden_layers * heads * head_dim / n_weights
