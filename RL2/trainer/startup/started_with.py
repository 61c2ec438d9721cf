"""What must be the same on all ranks of a run: its command, the files behind it, versions, and
variables that change results."""

import os
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

import RL2
from RL2.config.flat import as_text, flat
from RL2.config.user_code import CODE_KEYS, without_places
from RL2.distributed.same_start import Fact, fingerprint
from RL2.runtime.secrets import redact_config
from RL2.trainer.checkpoints import record
from RL2.trainer.startup.fingerprints import NOT_READABLE

_COMMAND = "start all ranks with the same command"
_DEVICE = "start all ranks on machines of one kind, or with actor.device=cpu"
_VERSIONS = "install the same on all machines"
_FILES = "give all ranks the same files"
_VARIABLES = "set it alike for all ranks, or for none"

# Paths may differ between machines. The contents are compared when they are read.
_PATH_KEYS = {
    "actor.model_name", "ref_actor.model_name", "critic.model_name", "teacher.model_name",
    "rollout.model_name",
    "rollout.env_path", "train_data.path", "test_data.path", "data.path", "data.test_path",
}  # fmt: skip
# What each machine may set for itself, and what only rank 0 uses.
_MACHINE_KEYS = {
    "rollout.server_python", "rollout.weights_dir", "rollout.base_port", "rollout.env_workers",
    "rollout.servers_per_node", "rollout.gpu_memory_utilization",
    "trainer.trackers", "trainer.use_wandb", "trainer.project", "trainer.show_samples",
}  # fmt: skip

_PACKAGES = ("rl2", "torch", "transformers", "tokenizers")
_CUDA_PACKAGES = ("triton", "flash-attn", "liger-kernel")

# Variables of libraries that change numbers.
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
    "ATEN_CPU_CAPABILITY", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "NCCL_ALGO", "NCCL_PROTO", "TRITON_INTERPRET",
    "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE",
)  # fmt: skip
_DEBUG = "TORCH_DISTRIBUTED_DEBUG"


def started_with(config: DictConfig) -> dict[str, Fact]:
    """What this rank was started with, by key, package or variable.

    config: composed and checked, with `auto` values decided for this machine, but not resolved.
    """
    return dict([*_command(config), *_versions(config), *_variables()])


def file_facts(
    config: DictConfig, inputs: Mapping[str, str], datasets: Mapping[str, Dataset]
) -> dict[str, Fact]:
    """The contents behind the config's paths and names on this machine.

    inputs: what `fingerprints.of_run` returned. datasets: the data sets that were read, by the node
        that names them.
    """
    facts = {}
    for name, data in datasets.items():
        key = name if "." in name else f"{name}.path"
        shown = f"{len(data)} rows of {OmegaConf.select(config, key)}"
        facts[key] = _of_file(shown, f"{len(data)} {data.fingerprint}")
    for name, found in inputs.items():
        if (key := name) not in facts:
            if "." not in name:
                name, key = f"the {name} of actor.model_name", "actor.model_name"
            facts[name] = _of_file(OmegaConf.select(config, key), found)
    return facts


def _of_file(shown: str, content: str) -> Fact:
    digest = fingerprint(content)
    tells = content if content.startswith((NOT_READABLE, "[")) else digest[:8]
    return Fact(f"{shown} ({tells})", _FILES, digest)


def _command(config: DictConfig) -> Iterator[tuple[str, Fact]]:
    # First, as other keys depend on it.
    yield "actor.device", Fact(str(config.actor.device), _DEVICE)
    unresolved = dict(flat(OmegaConf.to_container(config, resolve=False)))
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    hidden = dict(flat(redact_config(plain)))
    # Keys that follow others come last: the user has set the other one.
    for key, value in sorted(flat(plain), key=lambda one: "${" in str(unresolved.get(one[0]))):
        if key in CODE_KEYS:
            yield key, Fact(as_text(without_places(value)), _COMMAND)
        elif key in _PATH_KEYS:
            yield key, Fact("null" if value is None else "a path", _COMMAND)
        elif key not in {"actor.device", *_MACHINE_KEYS}:
            yield key, Fact(as_text(hidden.get(key)), _COMMAND, fingerprint(as_text(value)))


def _versions(config: DictConfig) -> Iterator[tuple[str, Fact]]:
    yield "Python", Fact(".".join(map(str, sys.version_info[:2])), _VERSIONS)
    used = (
        *_PACKAGES,
        *(("peft",) if config.actor.lora.rank is not None else ()),
        *(_CUDA_PACKAGES if config.actor.device == "cuda" else ()),
    )
    found = record.versions()
    for name in used:
        if name in found:
            yield name, Fact(found[name], _VERSIONS)
    yield "the source of RL2", Fact(_source_of(Path(RL2.__file__).parent), _VERSIONS)


def _source_of(folder: Path) -> str:
    digest = sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _variables() -> Iterator[tuple[str, Fact]]:
    for name in VARIABLES:
        if name in os.environ:
            yield name, Fact(os.environ[name], _VARIABLES)
    # With it torch runs another collective before each one, and other ranks must do the same.
    if os.environ.get(_DEBUG, "").upper() == "DETAIL":
        yield _DEBUG, Fact("DETAIL", _VARIABLES)
