"""Number formats of a model: those it is stored in, the one it computes in, and the attention that
follows from that."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from RL2.ops.attention import NAME
from RL2.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FLASH = "flash_attention"


@dataclass(frozen=True)
class Dtypes:
    """compute: the forward's dtype. stored: the checkpoint's. of_tensors: the dtypes of those
    tensors of the checkpoint that are stored differently, such as a router's biases in fp32."""

    compute: torch.dtype
    stored: torch.dtype
    of_tensors: Mapping[str, torch.dtype] = field(default_factory=dict)

    def saved(self, name: str, asked: str) -> torch.dtype:
        """The dtype in which a tensor is saved. asked: `trainer.save_dtype`."""
        if asked != "auto":
            return getattr(torch, asked)
        return self.of_tensors.get(name, self.stored)


def find_dtypes(asked: str, saved: PretrainedConfig, files: Mapping[str, Path]) -> Dtypes:
    """Must be called before a model is built from `saved`, which writes its own dtype there.

    Args:
        asked: `actor.dtype`; with `auto` the model computes in the dtype in which it is stored, but
            fp16, which would need loss scaling, becomes bf16, which has the range of fp32.
        saved: the checkpoint's config.json.
        files: `{tensor name: safetensors file}`; may be empty.
    """
    of_tensors = _dtypes_of_tensors(files)
    stored = saved.dtype or saved.get_text_config().dtype
    if stored is None:  # written by an early transformers, or by hand
        counts = Counter(of_tensors.values())
        stored = counts.most_common(1)[0][0] if counts else torch.float32
    if stored not in _STORED.values():
        raise ConfigError(
            f"actor.model_name: its config.json says dtype={stored}, which cannot be trained; "
            f"give a model in one of {', '.join(map(str, _STORED.values()))}"
        )
    if asked != "auto":
        compute = getattr(torch, asked)
    else:
        compute = {torch.float16: torch.bfloat16, torch.float64: torch.float32}.get(stored, stored)
    others = {name: dtype for name, dtype in of_tensors.items() if dtype != stored}
    return Dtypes(compute, stored, others)


def resolve_attention(asked: str, compute: torch.dtype) -> str:
    """`actor.attn_implementation`, where `auto` means that flash attention is available.

    Raises:
        ConfigError: flash attention in fp32, for which it has no kernels.
    """
    if asked == "auto":
        return NAME if compute == torch.float32 else "flash_attention_2"
    if asked.startswith(_FLASH) and compute == torch.float32:
        raise ConfigError(
            f"actor.attn_implementation={asked}: has no kernels for float32, in which this model "
            f"computes; use actor.dtype=bfloat16, or actor.attn_implementation={NAME}"
        )
    return asked


def _dtypes_of_tensors(files: Mapping[str, Path]) -> dict[str, torch.dtype]:
    """The dtypes of floating-point tensors, read from the headers alone."""
    dtypes = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if dtype := _STORED.get(file.get_slice(name).get_dtype()):
                    dtypes[name] = dtype
    return dtypes
