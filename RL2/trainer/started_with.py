"""What must be the same on all ranks of a run: its command, the files behind it, versions, and
variables that change results."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

import RL2
from RL2.algorithms.token_loss import TokenLoss
from RL2.config.errors import first_line
from RL2.config.flat import as_text, flat
from RL2.config.schema import Device
from RL2.config.secrets import redact_config
from RL2.datasets.end_of_turn import EndTokens
from RL2.distributed.same_start import Fact, fingerprint
from RL2.trainer import manifest
from RL2.trainer.fingerprints import source_fingerprint, tokenizer_fingerprint
from RL2.workers.loading import model_fingerprint

_COMMAND = "start all ranks with the same command"
_DEVICE = "start all ranks on machines of one kind, or with actor.device=cpu"
_VERSIONS = "install the same on all machines"
_FILES = "give all ranks the same files"
_VARIABLES = "set it alike for all ranks, or for none"

# Files that may lie elsewhere on each machine. What they hold is compared when it is read.
_FILES_OF = {
    "actor.model_name", "ref_actor.model_name", "rollout.model_name", "rollout.env_path",
    "actor.loss.import_path", "train_data.path", "test_data.path", "data.path",
}  # fmt: skip
# Where a machine has what it needs for itself, how much it does at a time, and what rank 0 shows.
_OF_A_MACHINE = {
    "rollout.server_python", "rollout.weights_dir", "rollout.base_port", "rollout.env_workers",
    "rollout.servers_per_node", "rollout.gpu_memory_utilization",
    "trainer.use_wandb", "trainer.project", "trainer.show_samples",
}  # fmt: skip
_NOT_READABLE = "not readable:"

_PACKAGES = ("rl2", "torch", "transformers", "tokenizers")
_OF_CUDA = ("triton", "flash-attn", "liger-kernel")

# Variables of libraries that change numbers, or have ranks wait for each other for ever.
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
    "ATEN_CPU_CAPABILITY", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "NCCL_ALGO", "NCCL_PROTO", "TRITON_INTERPRET",
    "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE",
)  # fmt: skip


def started_with(config: DictConfig) -> dict[str, Fact]:
    """By key, package or variable.

    config: composed, checked, and with what is `auto` decided for this machine, but not resolved.
    """
    return dict([*_command(config), *_versions(config), *_variables()])


def files_behind(
    config: DictConfig,
    loss: TokenLoss,
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
    datasets: Mapping[str, Dataset],
    models: Iterable[str],
) -> dict[str, Fact]:
    """Fingerprints of what the config's paths and names stand for on this machine.

    datasets: what was read, by the node that names it. models: nodes of those that will be loaded.
    """
    found: dict[str, tuple[str, str]] = {}  # what is shown, and the fingerprint
    if (path := config.actor.loss.import_path) is not None:
        found["actor.loss.import_path"] = path, source_fingerprint(loss.function)
    if "rollout" in config:
        path = config.rollout.env_path
        found["rollout.env_path"] = path, source_fingerprint(path)
    for key, data in datasets.items():
        if (path := config[key].path) is not None:
            found[f"{key}.path"] = f"{len(data)} rows of {path}", f"{len(data)} {data.fingerprint}"
    for key in models:
        node = config[key]
        try:
            content = model_fingerprint(node.model_name, node.revision)
            content += _texts_of(Path(node.model_name))
        except Exception as error:  # of broken files, anything; where all ranks have it, who loads
            content = f"{_NOT_READABLE} {first_line(error)}"  # the model says it
        found[f"{key}.model_name"] = node.model_name, content
    name = config.actor.model_name
    found["the tokenizer of actor.model_name"] = name, tokenizer_fingerprint(tokenizer)
    found["the end tokens of actor.model_name"] = str(ends.ids), repr((ends.ids, ends.saved))
    if (start := config.trainer.load_ckpt_from) not in (None, "latest"):
        found["trainer.load_ckpt_from"] = start, (Path(start) / manifest.NAME).read_text()
    return {
        key: Fact(f"{shown} ({_short(content)})", _FILES, fingerprint(content))
        for key, (shown, content) in found.items()
    }


def _short(content: str) -> str:
    return content if content.startswith(_NOT_READABLE) else fingerprint(content)[:8]


def _texts_of(folder: Path) -> str:
    """What else a model's folder has that is read: how it generates, and code of its own."""
    names = sorted([*folder.glob("generation_config.json"), *folder.glob("*.py")])
    return "".join(f"{path.name}\n{path.read_text(errors='replace')}" for path in names)


def _command(config: DictConfig) -> Iterator[tuple[str, Fact]]:
    # First, as other keys become something else with it.
    yield "actor.device", Fact(str(config.actor.device), _DEVICE)
    unresolved = dict(flat(OmegaConf.to_container(config, resolve=False)))
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    hidden = dict(flat(redact_config(plain)))
    # Those that follow others come last: the other one is what somebody has set.
    for key, value in sorted(flat(plain), key=lambda one: "${" in str(unresolved.get(one[0]))):
        if key in _FILES_OF:
            yield key, Fact("null" if value is None else "a path", _COMMAND)
        elif key not in {"actor.device", *_OF_A_MACHINE}:
            yield key, Fact(as_text(hidden.get(key)), _COMMAND, fingerprint(as_text(value)))


def _versions(config: DictConfig) -> Iterator[tuple[str, Fact]]:
    yield "Python", Fact(".".join(map(str, sys.version_info[:2])), _VERSIONS)
    used = (
        *_PACKAGES,
        *(("peft",) if config.actor.lora.rank is not None else ()),
        *(_OF_CUDA if config.actor.device == Device.cuda else ()),
    )
    for name in used:
        try:
            yield name, Fact(version(name), _VERSIONS)
        except PackageNotFoundError:
            pass
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
