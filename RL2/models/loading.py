"""Reading a checkpoint so that no rank ever holds the whole model.

A model is built without memory (on the meta device), split and sharded, and then every rank reads
its part of each parameter. This works if the files are safetensors with the model's own names and
shapes. Anything else (fused experts, pickled weights) is left to transformers, which loads the
whole model on every rank before it is split.
"""

import json
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from RL2.runtime.errors import ConfigError

# Entries of a config.json that do not affect what the model computes.
_OF_FILES = ("_name_or_path", "transformers_version")
_WHOLE, _SAMPLE, _OF_TENSOR = 2**26, 2**16, 2**12  # bytes

_FLOATS = {"F64", "F32", "F16", "BF16"}


def weight_files(model_name: str, revision: str | None = None) -> dict[str, Path]:
    """`{tensor name: safetensors file}` of a folder or hub id; empty if there are none.

    revision: commit of the hub id.
    """
    options = {"_raise_exceptions_for_missing_entries": False, "revision": revision}
    if index := cached_file(model_name, SAFE_WEIGHTS_INDEX_NAME, **options):
        names = json.loads(Path(index).read_text())["weight_map"]
        found = {name: cached_file(model_name, name, **options) for name in {*names.values()}}
        return {name: Path(found[file]) for name, file in names.items() if found[file]}
    if single := cached_file(model_name, SAFE_WEIGHTS_NAME, **options):
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), Path(single))
    return {}


def model_fingerprint(model_name: str, revision: str | None = None) -> str:
    """A SHA-256 that distinguishes the models of two folders or hub ids, wherever they are.

    Small files of weights are read whole. Of larger ones it reads the size and the beginning
    (names and shapes), and the beginning, middle and end of every tensor, or, for pickled ones, of
    the file: training changes those, and copying does not.
    """
    content = json.loads(Path(cached_file(model_name, CONFIG_NAME, revision=revision)).read_text())
    content = {name: value for name, value in content.items() if name not in _OF_FILES}
    digest = sha256(json.dumps(content, sort_keys=True).encode())
    files = {*weight_files(model_name, revision).values(), *Path(model_name).glob("*.bin")}
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start, length in _samples(file, size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _samples(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Where to read a file of weights, and how much, to tell it from other files."""
    if size <= _WHOLE:
        yield 0, size
        return
    for start in (0, size // 2, size - _SAMPLE):
        yield start, _SAMPLE
    file.seek(0)  # the caller has moved it
    header_size = int.from_bytes(file.read(8), "little")
    if not file.name.endswith(".safetensors") or header_size > _WHOLE:
        return
    header = json.loads(file.read(header_size))
    yield 0, 8 + header_size
    for name in sorted(header.keys() - {"__metadata__"}):
        first, last = (8 + header_size + offset for offset in header[name]["data_offsets"])
        for start in (first, (first + last) // 2, max(first, last - _OF_TENSOR)):
            yield start, min(_OF_TENSOR, last - start)


def holds_all(files: dict[str, Path], model: PreTrainedModel, new: Collection[str] = ()) -> bool:
    """Whether the files have each of the model's tensors, tied ones once, under its own name and
    in its shape.

    new: names of tensors that they may lack.

    Raises:
        ConfigError: a parameter is stored as integers: it is quantised and cannot be trained.
    """
    wanted: dict[Path, dict[str, Tensor]] = {}
    for name, tensor in _stored(model).items():
        if name not in files:
            if name in new:
                continue
            return False
        wanted.setdefault(files[name], {})[name] = tensor
    for path, tensors in wanted.items():
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                stored = file.get_slice(name)
                if stored.get_shape() != list(tensor.shape):
                    return False
                if tensor.is_floating_point() and stored.get_dtype() not in _FLOATS:
                    raise ConfigError(
                        f"actor.model_name: {name} in {path} is stored as {stored.get_dtype()}, "
                        "quantised or damaged; give the model with float weights"
                    )
    return True


def materialize(
    root: nn.Module, model: PreTrainedModel, files: dict[str, Path], device: torch.device
) -> None:
    """Give a sharded model on the meta device memory on `device`, and its weights.

    Besides the model's shard, at most one tensor's part is in memory.

    Args:
        root: the sharded module around `model`.
        files: from `weight_files`, checked by `holds_all`. Tensors that they lack become 0.
    """
    root.to_empty(device=device)
    model.tie_weights()
    for name, tensor in _stored(model).items():
        tensor._is_hf_initialized = True
        name = plain_name(name)
        if name is None:  # for `init_adapters`
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in files:
            local.detach().zero_()
            continue
        # The file is opened for each tensor: closing it frees the mapped pages.
        with safe_open(files[name], "pt") as file:
            part = file.get_slice(name)[local_part(tensor)]
        local.detach().copy_(part)
    # transformers computes what no file holds (the frequencies of rotary embeddings).
    model.initialize_weights()


def plain_name(name: str) -> str | None:
    """A tensor's name in the model without adapters (LoRA); None for an adapter's tensor."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def local_part(tensor: Tensor) -> tuple[slice, ...]:
    """The slices of a whole tensor that are this rank's shard.

    The innermost mesh dimension (tensor parallelism) cuts first and the others cut the result, each
    into parts as `torch.chunk` makes them.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for dim in reversed(range(mesh.ndim)):
            placement = tensor.placements[dim]
            if placement.is_replicate():
                continue
            start, stop = bounds[placement.dim]
            size = -(-(stop - start) // mesh.size(dim))
            start = min(start + mesh.get_local_rank(dim) * size, stop)
            bounds[placement.dim] = (start, min(start + size, stop))
    return tuple(slice(start, stop) for start, stop in bounds)


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: parameters, tied ones once, and persistent buffers."""
    saved = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers
