"""The published weights: one full copy per node, in a file that servers can map.

Ranks hold shards, but servers need the whole model, and a server that is restarted during a rollout
needs it when other ranks cannot help to gather it. So the driver of a node keeps a copy in the
engine's dtype. It is a safetensors file, in memory (`/dev/shm`) if there is room. The tensors are
views of the file, and every way of sending the weights starts from it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from RL2.runtime.errors import EngineError, first_line

_SHARED_MEMORY = Path("/dev/shm")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """Sum of the elements' bit patterns as signed integers, modulo 2^64.

    Equal tensors have equal sums. The sum of a concatenation is the sum of the sums, in any order,
    so that fused or sharded parameters can be compared with their parts.
    """
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64)) % 2**64


class HostWeights:
    """A full copy of the weights on the CPU, filled by each publication.

    Args:
        dtype: dtype that floating-point tensors are cast to; None keeps theirs.
        config, tokenizer, generation: the model's config, tokenizer and generation config (if any);
            saved with the weights, so that the folder is a complete model.
        folder: folder of the file. None makes a new one, which `close` removes: in shared memory if
            the model fits there twice, else in the temporary directory.

    version is None until the first `fill`.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        *,
        config: Any = None,
        tokenizer: Any = None,
        generation: Any = None,
        folder: str | Path | None = None,
    ):
        self.dtype = dtype
        self.version: int | None = None
        self._config, self._others = config, (tokenizer, generation)
        self._folder = None if folder is None else Path(folder)
        self._own_folder = folder is None
        self._tensors: dict[str, Tensor] = {}
        self._checksums: dict[str, int] | None = None

    @property
    def folder(self) -> Path:
        """The folder of `model.safetensors`. Raises EngineError before the first `fill`."""
        if self._folder is None or not self._tensors:
            raise EngineError("no weights have been published yet")
        return self._folder

    @property
    def model_folder(self) -> Path | None:
        """The folder, if it is a complete model by now."""
        return self._folder if self._config is not None and self.version is not None else None

    def fill(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy all tensors; in place after the first time.

        Raises EngineError naming a parameter that is new, missing or has another shape. The copy
        is then partly new and keeps the old version number.
        """
        if not self._tensors:
            self._create({name: self._cast(tensor) for name, tensor in named_tensors})
        else:
            missing = set(self._tensors)
            for name, tensor in named_tensors:
                target = self._tensors.get(name)
                if target is None:
                    raise EngineError(f"weight update {version}: {name} was not there before")
                if target.shape != tensor.shape:
                    raise EngineError(
                        f"weight update {version}: {name} has shape {tuple(tensor.shape)}, "
                        f"{tuple(target.shape)} before"
                    )
                target.copy_(tensor)
                missing.discard(name)
            if missing:
                raise EngineError(
                    f"weight update {version}: {min(missing)} is missing ({len(missing)} in all)"
                )
        self.version, self._checksums = version, None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """`(name, tensor)` in the order of the first publication, with the names of transformers;
        a tied parameter comes once."""
        return iter(self._tensors.items())

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Consecutive tensors, up to `max_bytes` together; a larger tensor is a bucket alone."""
        bucket, size = [], 0
        for name, tensor in self:
            if bucket and size + tensor.nbytes > max_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if bucket:
            yield bucket

    def checksums(self) -> dict[str, int]:
        """`checksum` of every tensor; computed once per version."""
        if self._checksums is None:
            self._checksums = {name: checksum(tensor) for name, tensor in self}
        return self._checksums

    def close(self) -> None:
        """Drop the tensors, and remove the folder if this object made it."""
        self._tensors = {}
        if self._own_folder and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()

    def _create(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            raise EngineError("weight update: it has no parameters")
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is None:
            # With the pid, by which a guard finds the folder of a killed trainer (guard.py).
            prefix = f"rl2-weights-{os.getpid()}-"
            self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=_parent(2 * n_bytes)))
        path = self._folder / "model.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"format": "pt"})
            for part in (self._config, *self._others):
                if part is not None:
                    part.save_pretrained(self._folder)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"rollout.weights_dir: the copy of the weights that servers get, {n_bytes} bytes, "
                f"cannot be written to {self._folder} ({first_line(error)}); name a folder with "
                "more room"
            ) from error
        self._tensors = _mapped(path, list(tensors))


def _parent(need: int) -> str | None:
    """Shared memory if `need` bytes fit, else None for the temporary directory."""
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > need:
        return str(_SHARED_MEMORY)
    return None


def _mapped(path: Path, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views that write through to it.

    The format: 8 bytes with the little-endian length of a JSON header, the header with each
    tensor's dtype, shape and offsets, and the data.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    data = data[8 + size :]
    tensors = {}
    for name in names:
        begin, end = header[name]["data_offsets"]
        dtype = _DTYPES[header[name]["dtype"]]
        tensors[name] = data[begin:end].view(dtype).view(header[name]["shape"])
    return tensors


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
