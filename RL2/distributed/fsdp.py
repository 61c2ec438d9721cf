"""Fully sharded data parallelism (FSDP2) over a module that wraps a transformers model."""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def shard(
    root: nn.Module,
    layer_classes: set[str],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    exact: Collection[str] = (),
) -> None:
    """Shard every layer whose class is named in `layer_classes`, then the root, in place.

    Weights stay fp32 (the optimizer would lose updates of 1e-6 in bf16), are gathered in
    `compute_dtype` and gradients are reduced in fp32. Gradients are *summed* over ranks, never
    averaged: the losses are divided by counts over the whole optimizer batch beforehand, and a
    mean over ranks on top would make the update depend on how many there are.

    Args:
        root: the module, on its device or on the meta device.
        layer_classes: names of the layers' classes.
        mesh: the `(ddp, fsdp)` part of a mesh that includes tensor parallelism, if any.
        compute_dtype: dtype in which weights are gathered.
        exact: names, within the model, of layers that are computed in fp32.
    """
    if mesh["ddp"].size() == 1:  # else gradients would be reduced over groups of one
        mesh = mesh["fsdp"]
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    n_shards = mesh.size(-1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Not the dimension that tensor parallelism has cut, if the other divides evenly."""
        cut = isinstance(parameter, DTensor) and parameter.placements[0] == Shard(0)
        if cut and parameter.ndim > 1 and parameter.shape[1] % n_shards == 0:
            return Shard(1)
        return None  # Shard(0)

    for name, module in root.named_modules():
        if name.removeprefix("model.") in exact:
            fp32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
            fully_shard(module, mesh=mesh, mp_policy=fp32, shard_placement_fn=placement)
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    fully_shard(root, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:  # one rank would divide by it, in a copy of every gradient
                module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which a divide factor would otherwise need
            module.set_force_sum_reduction_for_comms(True)


def full_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(name, whole parameter)` one by one; a collective: every rank must iterate.

    At most one whole parameter exists at a time, so that no rank needs memory for the model.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Clip to `max_norm`; returns the norm before clipping, over all ranks.

    If it is not finite, the gradients are not changed: squares of finite ones overflow in float32
    from 1.8e19 on, and float64 as `dtype` may find their norm.

    torch computes norms of tensors on one mesh, but with tensor parallelism split and whole
    parameters are on different meshes.
    """
    groups: dict[DeviceMesh, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(parameter.device_mesh, []).append(parameter)
    norms = [_norm([p.grad for p in group], dtype).full_tensor() for group in groups.values()]
    total = torch.linalg.vector_norm(torch.stack(norms))
    known = total.where(total.isfinite(), 0.0)  # a norm of 0 clips nothing; no wait for the device
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, known)
    return total


def _norm(gradients: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float32:
        return get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
