"""Inside a vLLM server: a worker that takes weights and returns checksums and log-probabilities.

The server is started with `--worker-cls rl2_vllm.Worker` and this folder on PYTHONPATH. Methods
that start with `rl2_` are called through /collective_rpc, which passes strings only. This module
imports nothing of RL2, which is not installed in the server's environment.

Three things differ from vLLM's own worker:

- Log-probabilities are those of softmax(logits / temperature), before top-p. vLLM offers the
  untempered ones or those after top-p.
- On the CPU, linear layers keep their weights unpacked. vLLM packs them for oneDNN and drops the
  originals, so that they could not be compared; and a reload does not update the packed copy of a
  tied head.
- It joins a process group with the trainer, also on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

# vLLM's load formats that we replace on the CPU, and our names for them.
_PLAIN_FORMATS = {"auto": "rl2_plain_auto", "safetensors": "rl2_plain_safetensors"}
_BACKEND_DEVICE = {"gloo": "cpu", "nccl": "cuda"}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Worker(_Worker):
    """vLLM's worker for this platform, with the changes that the module's docstring lists."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if current_platform.is_cpu():
            wanted = self.load_config.load_format
            self.load_config.load_format = _PLAIN_FORMATS.get(wanted, wanted)
        super().load_model(*args, **kwargs)
        _use_plain_weights(self.model_runner.get_model())
        sampler = self.model_runner.sampler
        if not hasattr(sampler, "topk_topp_sampler"):
            raise RuntimeError("unknown model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
        sampler.topk_topp_sampler = _TemperedLogps(sampler.topk_topp_sampler)

    def rl2_load_file(self, path: str) -> None:
        """Take all weights from a safetensors file, in the checkpoint's names and shapes."""
        from safetensors import safe_open

        def tensors() -> Iterator[tuple[str, Tensor]]:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)

        self._rl2_reload(weights_iterator=tensors())

    def rl2_load_folder(self, path: str) -> None:
        """Take all weights from a checkpoint, with vLLM's own loader."""
        self._rl2_reload(weights_path=path)

    def rl2_device(self) -> str:
        """The kind of device that holds the weights: "cpu" or "cuda"."""
        return self.device.type

    def rl2_receive(self, plan: str) -> None:
        """Join a process group with the trainer and take all weights from its broadcasts.

        plan: JSON object: address, port, world_size, name, backend and timeout of the group, where
        the trainer is rank 0 and our workers follow, and tensors: [name, dtype, shape] in the
        order in which they are sent.
        """
        wanted = json.loads(plan)
        tensors = wanted.pop("tensors")
        group = _join(rank=1 + self.rank, **wanted)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0

        def received() -> Iterator[tuple[str, Tensor]]:
            for name, dtype, shape in tensors:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                group.broadcast([tensor], options).wait()
                yield name, tensor

        try:
            self._rl2_reload(weights_iterator=received())
        finally:
            if wanted["backend"] == "nccl":
                group.abort()  # does not wait for the trainer, which may be gone

    def rl2_checksums(self) -> list[tuple[list[str], int, str]]:
        """The weights of this worker: (names in the checkpoint, elements, checksum) of each part.

        The checksum is the sum of the elements' bit patterns as signed integers modulo 2^64, as a
        decimal string. Each part of a fused parameter has its own entry; a parameter that cannot be
        split has one entry with several names. Raises ValueError naming an embedding whose padding
        is not zero.
        """
        model = self.model_runner.get_model()
        fused = getattr(model, "packed_modules_mapping", {})
        entries = []
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                for names, part in _parts(path, name, module, parameter.data, fused):
                    entries.append((names, part.numel(), str(_checksum(part))))
        return entries

    def _rl2_reload(self, **source: Any) -> None:
        self.reload_weights(**source)
        _use_plain_weights(self.model_runner.get_model())


def _join(
    *, address: str, port: int, world_size: int, rank: int, name: str, backend: str, timeout: float
) -> Any:
    """The group; see RL2/engines/servers/weight_group.py for the other side and the prefixes."""
    limit = timedelta(seconds=timeout)
    keys: Any = dist.TCPStore(address, port, world_size, is_master=False, timeout=limit)
    for prefix in (name, f"{name}/", f"{_BACKEND_DEVICE[backend]}/"):
        keys = dist.PrefixStore(prefix, keys)
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(address))]
        options._timeout = limit
        return dist.ProcessGroupGloo(keys, rank, world_size, options)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(keys, rank, world_size, options)


def _own_address(peer: str) -> str:
    """The address of this machine from which it reaches `peer`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing
        return probe.getsockname()[0]


class _TemperedLogps(nn.Module):
    """Wraps vLLM's sampler, which gets logits that are tempered and not yet cut by top-p."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        inner.logprobs_mode = "raw_logprobs"  # that is: return none

    def forward(
        self, logits: Tensor, generators: dict[int, torch.Generator], k: Any, p: Any
    ) -> tuple[Tensor, Tensor]:
        logps = logits.log_softmax(dim=-1, dtype=torch.float32)
        sampled, _ = self.inner(logits, generators, k, p)
        return sampled, logps


@register_model_loader(_PLAIN_FORMATS["auto"])
@register_model_loader(_PLAIN_FORMATS["safetensors"])
class _PlainLoader(DefaultModelLoader):
    """The default loader, except that it does not pack the weights of linear layers on the CPU."""

    def __init__(self, load_config: Any) -> None:
        wanted = load_config.load_format.removeprefix("rl2_plain_")
        super().__init__(dataclasses.replace(load_config, load_format=wanted))

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        for module in model.modules():
            module._cpu_skip_gemm_dispatch = True  # vLLM's own switch, read while it loads
        super().load_weights(model, model_config)


def _use_plain_weights(model: nn.Module) -> None:
    """Have embeddings and heads multiply with their parameter instead of a packed copy of it.

    vLLM keeps both, and updates the copy of a tied head only when that head itself is loaded.
    """
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.cpu_linear = nn.functional.linear


def _parts(
    path: str, name: str, module: nn.Module, tensor: Tensor, fused: dict[str, list[str]]
) -> Iterator[tuple[list[str], Tensor]]:
    """Cut a parameter into the parts that have names in the checkpoint: ([names], rows) each."""
    parent, _, leaf = path.rpartition(".")
    if isinstance(module, VocabParallelEmbedding):
        rows = module.shard_indices.num_org_elements
        if tensor[rows:].count_nonzero():
            raise ValueError(f"{path}.{name}: the padding of the vocabulary is not zero")
        tensor = tensor[:rows]
    if leaf not in fused:
        yield [f"{path}.{name}"], tensor
        return
    prefix = f"{parent}." if parent else ""
    names = [f"{prefix}{part}.{name}" for part in fused[leaf]]
    sizes = getattr(module, "output_partition_sizes", [])
    if len(sizes) == len(names) and sum(sizes) == tensor.shape[0]:
        for own, rows in zip(names, tensor.split(sizes), strict=True):
            yield [own], rows
    else:
        yield names, tensor


def _checksum(tensor: Tensor) -> int:
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64)) % 2**64
