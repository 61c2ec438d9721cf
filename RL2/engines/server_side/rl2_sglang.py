"""Starts an SGLang server for RL2: `python -m rl2_sglang <arguments of sglang.launch_server>`.

It imports nothing of RL2, which is not installed in the server's environment. Every process of the
server imports this module, as each is spawned from the main one. It uses the hooks that SGLang
offers to plugins. What differs from SGLang's own launcher:

- The key that clients must send comes from the variable RL2_SERVER_KEY, not from the command line,
  which every user of the machine can read. The key is not logged.
- The context length is that of prompt and completion together. SGLang itself reserves a few
  positions, and silently cuts a completion short.
- A request's `sampling_seed` is always used. SGLang uses it with deterministic inference only,
  which not every attention backend supports.
- /weights_checker answers the action "rl2_checksums": see `checksums`.
- /update_weights_from_tensor also takes the names of tensors in a file, which each rank maps. A
  tensor that does not fit causes an HTTP error and does not end the server.
- Waking a server that is awake does nothing.
- The store of the server's own process group listens on loopback only.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor, nn

KEY_VARIABLE = "RL2_SERVER_KEY"
# Prompt and completion may have context_length - 2 tokens together, the prompt context_length - 7.
RESERVED = 6
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---------------------------------------------------------------------- checksums


def checksum(tensor: Tensor) -> int:
    """Sum of the elements' bit patterns as signed integers, modulo 2^64.

    The trainer has its own copy of this function; a test compares the two.
    """
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64)) % 2**64


def parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, once: `(name, tensor)`, a fused one in pieces named `name#0`, `name#1`, …

    A fused linear layer has the sizes of its outputs; its weight and bias are split by rows.
    """
    sizes = {
        name: list(module.output_partition_sizes)
        for name, module in model.named_modules()
        if len(getattr(module, "output_partition_sizes", ())) > 1
    }
    for name, parameter in model.named_parameters():
        split = sizes.get(name.rpartition(".")[0])
        if split is None or parameter.shape[0] != sum(split):
            yield name, parameter
        else:
            for index, piece in enumerate(parameter.split(split)):
                yield f"{name}#{index}", piece


def checksums(model: nn.Module) -> dict[str, str]:
    """`name -> "checksum numel dtype"` of what this rank holds, for all of `parts`."""
    return {
        name: f"{checksum(part)} {part.numel()} {str(part.dtype).removeprefix('torch.')}"
        for name, part in parts(model)
    }


def answer_checksums(original: Callable, checker: Any, action: str, *args: Any, **kwargs: Any):
    """SGLang's WeightChecker.handle, with one more action."""
    if action != "rl2_checksums":
        return original(checker, action, *args, **kwargs)
    return {
        "checksums": checksums(checker._get_model()),
        "per_gpu_checksum": "",
        "parallelism_info": checker._parallelism_info(role=kwargs["role"]).model_dump(),
    }


# ---------------------------------------------------------------------- other hooks


def use_seeds(info: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """After SamplingBatchInfo.from_schedule_batch: give the sampler the requests' seeds.

    A token is then a function of the seed, its position and the distribution. Requests without a
    seed, such as the server's own warm-up, share one.
    """
    if info.sampling_seed is None:
        seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device)
    return info


def without_keys(logged: dict[str, Any], *args: Any) -> dict[str, Any]:
    """After _server_args_for_logging: remove the keys."""
    return {name: value for name, value in logged.items() if not name.endswith("api_key")}


def read_place(original: Callable, worker: Any, payloads: list[bytes]) -> Any:
    """deserialize_own_rank, also for payloads that name tensors of a file."""
    if payloads[0][:1] == b"{":
        return json.loads(payloads[0])
    return original(worker, payloads)


def load_mapped(original: Callable, updater: Any, named_tensors: Any, **kwargs: Any):
    """WeightUpdater.update_weights_from_tensor, also for tensors of a file.

    named_tensors: what SGLang takes, or {"path": of a safetensors file, "names": in it}. Returns
    (success, message), also for exceptions, which would end the server.
    """
    try:
        if isinstance(named_tensors, dict) and "path" in named_tensors:
            with safe_open(named_tensors["path"], framework="pt") as file:
                named_tensors = [(name, file.get_tensor(name)) for name in named_tensors["names"]]
        return original(updater, named_tensors=named_tensors, **kwargs)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def wake_released(original: Callable, manager: Any, request: Any) -> Any:
    """resume_memory_occupation, only for the parts that were released, if any."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    request.tags = [tag for tag in request.tags or ALL_MEMORY if tag in manager.offload_tags]
    return original(manager, request) if request.tags else ResumeMemoryOccupationReqOutput()


ALL_MEMORY = ("kv_cache", "weights", "cuda_graph")


class LoopbackStore(dist.TCPStore):
    """A store that listens on loopback only, if its address is on loopback."""

    def __init__(self, host_name: str, port: int, world_size: int, is_master: bool, **kwargs: Any):
        if is_master and host_name in _LOOPBACK:
            family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((host_name, port))
                listener.listen()
                kwargs["master_listen_fd"] = listener.detach()
        super().__init__(host_name, port, world_size, is_master, **kwargs)


def install() -> None:
    """Register the hooks; SGLang applies them as each of its processes starts."""
    # By `import_module`, as the attribute of this name is a function.
    importlib.import_module("torch.distributed.rendezvous").TCPStore = LoopbackStore
    around, after = HookType.AROUND, HookType.AFTER
    for target, hook, kind in (
        ("utils.weight_checker.WeightChecker.handle", answer_checksums, around),
        ("sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", use_seeds, after),
        ("managers.tp_worker.BaseTpWorker.deserialize_own_rank", read_place, around),
        ("entrypoints.engine._server_args_for_logging", without_keys, after),
        (
            "model_executor.model_runner_components.weight_updater.WeightUpdater"
            ".update_weights_from_tensor",
            load_mapped,
            around,
        ),
        (
            "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
            ".resume_memory_occupation",
            wake_released,
            around,
        ),
    ):
        HookRegistry.register(f"sglang.srt.{target}", hook, kind)


# ---------------------------------------------------------------------- the launcher


def context_length(args: Any) -> int:
    """The limit for prompt and completion: from the command line, else from the model."""
    from sglang.srt.utils.hf_transformers.common import get_context_length, get_hf_text_config
    from sglang.srt.utils.hf_transformers.config import get_config

    config = get_config(
        args.model_path, trust_remote_code=args.trust_remote_code, revision=args.revision
    )
    limit = get_context_length(get_hf_text_config(config))
    if args.context_length is not None and args.context_length > limit:
        sys.exit(f"--context-length {args.context_length}: the model's limit is {limit}")
    return args.context_length or limit


def main(arguments: list[str]) -> None:
    """Parse, adjust and serve, until the server ends."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    args = prepare_server_args(arguments)
    args.api_key = os.environ.pop(KEY_VARIABLE, None) or sys.exit(f"{KEY_VARIABLE} is not set")
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    args.context_length = context_length(args) + RESERVED
    try:
        run_server(args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


install()
if __name__ == "__main__":
    main(sys.argv[1:])
