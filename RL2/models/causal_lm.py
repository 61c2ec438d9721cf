"""A transformers causal LM behind the one question the losses ask: statistics per token."""

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from RL2.config.models import hub_options, weight_options
from RL2.distributed import shard_of
from RL2.distributed.sequence_parallel import check_heads, register_sequence_parallel
from RL2.models.dtypes import Dtypes, find_dtypes, resolve_attention
from RL2.models.loading import holds_all, weight_files
from RL2.models.lora import add_adapters
from RL2.models.saved import load_whole, saved_config
from RL2.ops.attention import check_attention, check_rope, register_attention
from RL2.ops.fp32 import accelerate_linears
from RL2.ops.token_stats import (
    LossFunction,
    linear_token_loss,
    linear_token_stats,
    loss_of,
    token_stats,
)
from RL2.runtime.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

_DROPOUT = re.compile(r"^(?!.*(classif|summary|pooler)).*(drop|jitter)")


class TokenStatsModel(nn.Module):
    """Wraps a causal LM so that FSDP gathers the head's weight where the statistics need it.

    `forward` takes a pack of sequences and returns statistics of the chosen positions only;
    logits of prompt tokens are never computed, nor, with a linear head, all logits of a token.

    Args:
        model: the causal LM.
        implementation: of `RL2.ops.token_stats.linear_token_stats`.
        offload_activations: keep what the backbone's backward needs in CPU memory until then.

    `sp_group` and `tp_group` are the groups over which packs and weights are split, None without.
    `linear_head` says whether logits are one matrix product of the hidden states: what
    `RL2.models.self_check` found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        implementation: str = "auto",
        offload_activations: bool = False,
    ):
        super().__init__()
        self.model = model
        self.implementation = implementation
        self.offload_activations = offload_activations
        self.sp_group: dist.ProcessGroup | None = None
        self.tp_group: dist.ProcessGroup | None = None
        self.linear_head = isinstance(model.get_output_embeddings(), nn.Linear)

    def forward(
        self,
        states: torch.Tensor,
        lengths: torch.Tensor,
        positions: torch.Tensor,
        actions: torch.Tensor,
        temperature: float,
        wanted: Sequence[str],
        top_k: int = 0,
        loss_fn: LossFunction | None = None,
        start: int = 0,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            states: `[N]` input tokens, sequences one after the other; with sequence parallelism
                this rank's slice of them.
            lengths: `[n]` tokens of each sequence of the whole pack; in CPU memory, so that no
                kernel waits for the host.
            positions: `[A]` indices into `states` whose next token is asked about.
            actions: `[A]` those next tokens.
            temperature: divides the logits.
            wanted: names of the statistics, of `RL2.ops.token_stats.STATISTICS`.
            top_k: how many `top_logps`.
            loss_fn: as in `linear_token_loss`.
            start: where in the pack the slice begins.

        Returns:
            `{name: [A]}` in fp32 (`top_logps [A, top_k]`), or with `loss_fn` the sums of its loss,
            as `loss`, and of its metrics. A plain dict, because FSDP finds its hooks' tensors in
            those.
        """
        inputs = self.inputs(states, lengths, start)
        if not self.linear_head:
            logits = self.model(**inputs).logits[0].index_select(0, positions)
            stats = token_stats(logits, actions, temperature, wanted, top_k)
            if loss_fn is not None:
                loss, metrics = loss_of(stats, len(actions), loss_fn)
                return {"loss": loss, **metrics}
            return stats.as_dict()

        offload = self.offload_activations and torch.is_grad_enabled()
        with save_on_cpu(pin_memory=states.is_cuda) if offload else nullcontext():
            hidden = self.model.base_model(**inputs).last_hidden_state[0]
        weight, bias = self.head()
        arguments = hidden.index_select(0, positions), weight, actions, temperature, wanted
        options = {"bias": bias, "top_k": top_k, "implementation": self.implementation}
        if self.tp_group is not None:
            vocab_size = self.model.get_output_embeddings().weight.shape[0]
            options["shard"] = shard_of(vocab_size, self.tp_group)
        if loss_fn is not None:
            loss, metrics = linear_token_loss(*arguments, loss_fn, **options)
            return {"loss": loss, **metrics}
        return linear_token_stats(*arguments, **options).as_dict()

    def run(self, function: Callable[..., torch.Tensor], *args) -> torch.Tensor:
        """`function(self, *args)` with the weights gathered, as `forward` has them."""
        return function(self, *args)

    def inputs(self, states: torch.Tensor, lengths: torch.Tensor, start: int) -> dict:
        """What transformers' models take for a pack, or a slice of one."""
        device, longest = states.device, int(lengths.max())
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        token = torch.arange(start, start + len(states))
        row = torch.searchsorted(offsets, token, right=True) - 1
        offsets_32 = offsets.to(device, torch.int32)
        inputs = {
            "input_ids": states[None],
            "position_ids": (token - offsets[row]).to(device)[None],
            "use_cache": False,
            "cu_seq_lens_q": offsets_32,
            "cu_seq_lens_k": offsets_32,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return inputs if self.sp_group is None else inputs | {"sp_group": self.sp_group}

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the head, or this rank's columns of them."""
        head = self.model.get_output_embeddings()
        return tuple(
            x.to_local() if isinstance(x, DTensor) else x for x in (head.weight, head.bias)
        )


def load_model(config, *, train: bool) -> tuple[TokenStatsModel, Dtypes, dict[str, Path] | None]:
    """Build `config.model_name` with fp32 weights, to be split, sharded and then filled.

    Args:
        config: an `actor` or `ref_actor` node (model_name, dtype, attn_implementation, …).
        train: whether gradients will be asked for (decides on gradient checkpointing).

    Returns:
        The model, the dtypes that it computes and is stored in, and the files that
        `RL2.models.loading.materialize` reads its weights from: it is on the meta device then.
        No files: the model holds its weights.

    Raises:
        ConfigError: the model cannot be loaded, or not be spread as the config says.
    """
    name, options = config.model_name, hub_options(config)
    try:
        saved = saved_config(name, options)
    except ConfigError as error:
        raise ConfigError(f"actor.model_name={error}") from error
    except Exception as error:  # a broken file makes it raise anything
        raise _not_loadable(name, error) from error
    try:
        files = weight_files(name, config.revision)
        dtypes = find_dtypes(str(config.dtype), saved, files)
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _not_loadable(name, error) from error
    if train and dtypes.compute != dtypes.stored == torch.float16 and config.dtype == "auto":
        logger.warning(
            "actor.dtype=auto: %s is stored in float16, which cannot be trained in without scaling "
            "the loss; computing in bfloat16", name,
        )  # fmt: skip
    asked = resolve_attention(config.attn_implementation, dtypes.compute)
    check_attention(saved)
    check_rope(saved, config)
    if train and getattr(saved.get_text_config(), "output_router_logits", None):
        logger.warning(
            "actor.model_name: %s has output_router_logits=true, which asks for an auxiliary loss "
            "of the routers; it is not trained here, only actor.loss is", saved.model_type,
        )  # fmt: skip
    if config.sp_size > 1:
        check_heads(saved, config.sp_size, config.tp_size)
        attention = register_sequence_parallel(asked)
    else:
        attention = register_attention(asked)
    built = {"dtype": torch.float32, "attn_implementation": attention}
    try:
        model = _on_meta(saved, config, built)
    except Exception as error:  # the model's class may raise anything at numbers out of place
        check_buildable(saved, config, asked, error)
        raise _not_loadable(name, error) from error
    try:
        if not holds_all(files, model):
            model, files = _load_whole(config, built), None
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _not_loadable(name, error) from error
    if files is not None:
        try:
            model.generation_config = GenerationConfig.from_pretrained(
                name, revision=config.revision
            )
        except OSError:  # not every checkpoint has one
            pass
        except Exception as error:  # as above
            raise _not_loadable(name, error) from error
    if config.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    if train and config.lora.rank is not None:
        add_adapters(model, config.lora)
    if not (train and config.compile):
        accelerate_linears(model)
    model = TokenStatsModel(model, str(config.token_stats), train and config.offload_activations)
    return model, dtypes, files


def check_dropout(model_config: PretrainedConfig, config) -> None:
    """ConfigError where tensor-parallel ranks would each leave out something else."""
    own = dropout_of(model_config)
    if config.dropout is None and config.tp_size > 1 and own:
        name, value = next(iter(own.items()))
        raise ConfigError(
            f"actor.dropout=null: {model_config.model_type} has {name}={value}, and tensor-parallel"
            " ranks would leave out different parts of what they share; use actor.dropout=0, or "
            f"actor.tp_size=1 instead of {config.tp_size}"
        )


def check_head(model: TokenStatsModel, config) -> None:
    """ConfigError where the head's statistics cannot be computed as the config says."""
    if config.tp_size > 1 and model.linear_head and model.implementation == "naive":
        raise ConfigError(
            "actor.token_stats=naive: takes whole logits, which no rank has with "
            f"actor.tp_size={config.tp_size}; use auto or tiled"
        )
    if not model.linear_head and model.implementation not in ("auto", "naive"):
        raise ConfigError(
            f"actor.token_stats={model.implementation}: {config.model_name} does more than one "
            "matrix product between hidden states and logits, which are computed whole; use auto"
        )


def check_buildable(saved: PretrainedConfig, config, asked: str, error: Exception) -> None:
    """ConfigError where it was the attention that a model could not be built with."""
    others = []
    for other in ("sdpa", "eager"):
        with suppress(Exception):  # whatever the class thinks of it
            _on_meta(saved, config, {"dtype": torch.float32, "attn_implementation": other})
            others.append(other)
    if others and asked not in others:
        raise ConfigError(
            f"actor.attn_implementation={asked}: {saved.model_type} cannot be "
            f"built with it ({first_line(error)}); try {' or '.join(others)}, or a model of "
            "another family"
        ) from error


def _on_meta(saved: PretrainedConfig, config, options: dict) -> PreTrainedModel:
    """The model without memory."""
    options = options | {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None and "AutoModelForCausalLM" in getattr(saved, "auto_map", {}):
        options |= {"code_revision": config.revision}  # only code of the hub's takes it
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(saved, **options)


def _load_whole(config, options: dict) -> PreTrainedModel:
    """The model with its weights, read by transformers, which fills what is missing with noise."""
    name = config.model_name
    model, found = load_whole(name, weight_options(config), ignore_mismatched_sizes=True, **options)
    way_out = "; give the folder of a whole model, config.json and weights of one save_pretrained"
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"actor.model_name={config.model_name}: its files lack {len(missing)} of the model's "
            f"weights, such as {missing[0]}{way_out}"
        )
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"actor.model_name={config.model_name}: {name} has the shape {list(stored)}, the model "
            f"wants {list(wanted)}{way_out}"
        )
    return model


def compile_layers(model: PreTrainedModel, layer_classes: set[str], checkpointing: bool) -> None:
    """`torch.compile` the forward of every layer whose class is named in `layer_classes`, in place,
    and with `checkpointing` recompute it in backward.
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

    transformers' own switch works in training mode alone, which is also that of dropout; and it
    stands inside of the forward, where torch's compiler gives up on the whole layer.
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
    """Put a model into the mode of updates.

    Without dropout that is the one of evaluation: whatever a family calls its dropout and its
    noise, it has them in training mode alone. Adapters' dropout has a key of its own.
    """
    model.train(dropout is None)
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train()


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """What a model's config says of dropout and noise in its layers."""
    return {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if _DROPOUT.search(name) and isinstance(value, float) and value > 0
    }


def _not_loadable(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"actor.model_name={name}: cannot be loaded as a causal language model "
        f"({first_line(error)}); give a folder made by save_pretrained or a model id"
    )


def attention_cost(model: PreTrainedModel) -> float:
    """How much an n-token sequence's attention costs beside the rest: n + attention_cost * n^2
    multiplications, in units of what the weights cost for one token.

    A causal layer multiplies each token's query with n/2 keys on average and as many values:
    2 * heads * head_dim * n/2 multiplications a token, against one per weight.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    embedding = model.get_input_embeddings().weight.numel()
    n_weights = sum(p.numel() for p in model.parameters()) - embedding
    return config.num_hidden_layers * heads * head_dim / n_weights
