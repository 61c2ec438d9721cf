"""Tensor parallelism: a decoder's layers, and the head's vocabulary, are split over ranks."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from RL2.runtime.errors import ConfigError


@dataclass(frozen=True)
class ProcessGroupShard:
    """This rank's columns of the vocabulary: a `VocabularyShard` for `linear_token_stats`.

    Attributes:
        group: the tensor-parallel group; None is the default group. Its ranks hold consecutive
            parts of the vocabulary in the order of their ranks.
        start: first column of the whole vocabulary that this rank's weight holds.
        columns: how many of the weight's rows are columns of the vocabulary; the others, after
            them, are padding. May be 0.
        widest: the largest `columns` of all ranks.
    """

    group: dist.ProcessGroup | None
    start: int
    columns: int
    widest: int

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[n_ranks, *tensor.shape]` of equal shapes, in the order of the ranks."""
        parts = tensor.new_empty(dist.get_world_size(self.group), *tensor.shape)
        if tensor.numel():
            # All backends accept the flat form.
            flat = tensor.contiguous().view(-1)
            dist.all_gather_single(parts.view(-1), flat, group=self.group)
        return parts

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place; the same bits on all of them."""
        if not tensor.numel():
            return
        whole = tensor.contiguous()
        dist.all_reduce(whole, group=self.group)
        if whole is not tensor:
            tensor.copy_(whole)


def shard_of(vocab_size: int, group: dist.ProcessGroup | None = None) -> ProcessGroupShard:
    """The part of the vocabulary that `torch.chunk`, and a DTensor with `Shard(0)`, give this rank.

    Every part but the last ones has ceil(vocab_size / ranks) columns: the last that is not empty
    may be shorter, and those after it hold none.

    Raises:
        ValueError: a vocabulary without columns, or this rank is not in `group`.
    """
    own = dist.get_rank(group)
    if vocab_size < 1 or own < 0:
        raise ValueError(f"vocab_size={vocab_size} at rank {own} of the group: expected >= 1, >= 0")
    size = -(-vocab_size // dist.get_world_size(group))
    start = min(own * size, vocab_size)
    return ProcessGroupShard(group, start, min(size, vocab_size - start), widest=size)


# What transformers' plans ask for, in torch's terms. Inputs and outputs are plain tensors: whole,
# or, between a column-wise and a row-wise layer, this rank's part of the last dimension.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
}
_SUM_GRADIENTS = "replicated_with_grad_allreduce"
# With peft's adapters a layer `q_proj` is `q_proj.base_layer`, `q_proj.lora_A.default`, ….
_LAYER_AND_PART = re.compile(r"(?P<layer>.*?)(\.base_layer|\.(?P<part>lora_A|lora_B)\.\w+)?")


def tensor_parallel_plan(model: PreTrainedModel, size: int) -> dict[str, str]:
    """`{module name: style}` of transformers' plan for a decoder, one entry per module.

    Args:
        model: a causal LM, possibly on the meta device.
        size: number of ranks of the tensor-parallel group.

    Raises:
        ConfigError: transformers has no plan for the model, the plan needs something that is not
            available here (mixtures of experts) or omits parameters between split layers, or `size`
            does not divide heads or widths.
    """
    key, kind = f"actor.tp_size={size}", model.config.model_type
    patterns = {
        re.compile(re.escape(name).replace(r"\*", r"\d+")): style
        for name, style in (model.config.base_model_tp_plan or {}).items()
    }
    if not patterns:
        raise ConfigError(
            f"{key}: transformers has no tensor-parallel plan for {kind} models; use 1 (the "
            "weights are sharded over all ranks anyway) or actor.sp_size"
        )
    unknown = sorted(set(patterns.values()) - {*_STYLES, _SUM_GRADIENTS})
    if unknown:
        raise ConfigError(
            f"{key}: the plan of {kind} models has {', '.join(unknown)}, which is not available; "
            "use 1 (the weights are sharded over all ranks anyway) or actor.sp_size"
        )
    plan = {}
    for name, module in model.base_model.named_modules():
        if hasattr(module, "base_layer"):
            continue  # a layer with an adapter: its parts are split, not itself
        layer, part = _LAYER_AND_PART.fullmatch(name).group("layer", "part")
        for pattern, style in patterns.items():
            # Of an adapter, only the matrix on the split side of the layer.
            whole = {"lora_A": "colwise", "lora_B": "rowwise"}.get(part)
            if pattern.fullmatch(layer) and (whole is None or not style.startswith(whole)):
                plan[f"{model.base_model_prefix}.{name}"] = style
    _check_sizes(model, plan, key, size)
    for name, parameter in _between(model, plan):
        if parameter.numel() > 1:
            raise ConfigError(
                f"{key}: {name} {[*parameter.shape]} is between split layers, and the plan of "
                f"{kind} models does not say how to split it; use 1 (the weights are sharded over "
                "all ranks anyway) or actor.sp_size"
            )
    return plan


def _between(model: PreTrainedModel, plan: dict[str, str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters that no plan names, in blocks whose activations are split (such as an MLP).

    Each rank sees only its part of the activations there, and so only a part of the gradient.
    Blocks whose column-wise layers gather their output have whole activations.
    """
    layers = {name: _LAYER_AND_PART.fullmatch(name)["layer"] for name in plan}
    blocks = tuple(
        layers[name].rpartition(".")[0] + "."
        for name, style in plan.items()
        if style in ("colwise", "rowwise")
    )
    planned = tuple(f"{layer}." for layer in layers.values())
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.startswith(blocks) and not name.startswith(planned)
    ]


def _check_sizes(model: PreTrainedModel, plan: dict[str, str], key: str, size: int) -> None:
    config = model.config
    counts = {"num_attention_heads": config.num_attention_heads}
    counts["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or 0
    if any("k_proj" in name and style == "colwise" for name, style in plan.items()):
        for name, count in counts.items():
            if count % size:
                raise ConfigError(
                    f"{key}: must divide {name}={count} of the model; use a divisor of it, or "
                    "actor.sp_size"
                )
    vocab_size = config.vocab_size
    if (size - 1) * -(-vocab_size // size) >= vocab_size:
        raise ConfigError(
            f"{key}: leaves a rank without any of the vocab_size={vocab_size} columns of the head; "
            "use less, or actor.sp_size"
        )
    for name, style in plan.items():
        module = model.get_submodule(name)
        if style in _STYLES and (width := module.weight.shape[style.startswith("row")]) % size:
            raise ConfigError(
                f"{key}: must divide the width {width} of {name}; use a divisor of it, or "
                "actor.sp_size"
            )


def parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> list[str]:
    """Split a decoder's layers, embedding and head over a tensor-parallel mesh, in place.

    Layers follow transformers' plan; embedding and head are split along the vocabulary, of which
    `shard_of` gives this rank's part. Parameters that are not split stay plain and equal on all
    ranks of the mesh.

    Args:
        model: the model, with the same weights on all ranks, or on the meta device.
        mesh: a one-dimensional mesh.

    Returns:
        The names of whole parameters of which each rank sees only a part of the gradient, because
        they are between split layers (those that the plan names, and the parameters of trained
        activations). Those gradients must be summed over the mesh.

    Raises:
        ConfigError: as `tensor_parallel_plan`.
    """
    plan = tensor_parallel_plan(model, mesh.size())
    between = [name for name, _ in _between(model, plan)]
    styles = {name: _STYLES[style]() for name, style in plan.items() if style in _STYLES}
    names = {module: name for name, module in model.named_modules()}
    styles[names[model.get_input_embeddings()]] = RowwiseParallel(input_layouts=Replicate())
    if (head := model.get_output_embeddings()) is not None:
        styles[names[head]] = _STYLES["colwise_gather_output"]()
    # None: every rank has the weights already (or none has), so nothing must be sent.
    parallelize_module(model, mesh, styles, src_data_rank=None)
    model.tie_weights()
    return [
        f"{name}.{parameter}"
        for name, style in plan.items()
        if style == _SUM_GRADIENTS
        for parameter, _ in model.get_submodule(name).named_parameters()
    ] + between
