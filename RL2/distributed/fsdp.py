"""Fully sharded data parallelism (FSDP2) over a module that wraps a transformers model."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(
    root: nn.Module, layer_classes: set[str], mesh: DeviceMesh, compute_dtype: torch.dtype
) -> None:
    """Shard every layer whose class is named in `layer_classes`, then the root, in place.

    Weights stay fp32 (the optimizer would lose updates of 1e-6 in bf16), are gathered in
    `compute_dtype` and gradients are reduced in fp32. Gradients are *summed* over ranks, never
    averaged: the losses are divided by counts over the whole optimizer batch beforehand, and a
    mean over ranks on top would make the update depend on how many there are.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in root.modules():
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo knows no pre-multiplied sum, which a divide factor would otherwise ask for
            module.set_force_sum_reduction_for_comms(True)


def full_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(name, whole parameter)` one by one; a collective: every rank must iterate.

    At most one whole parameter is alive at a time, so that no rank needs room for the model.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
