"""What a run was started with, kept in its folder: `config.yaml` and `run.json`.

A resumed run moves those of the start before to `earlier/1`, `earlier/2` …
"""

import json
import os
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import RL2
from RL2.config.engines import SERVERS
from RL2.config.schema import SCHEMAS, schema_of
from RL2.runtime.folders import exists
from RL2.runtime.secrets import redact, redact_config

CONFIG, RUN, EARLIER = "config.yaml", "run.json", "earlier"
_PACKAGES = (
    "rl2", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "hydra-core",
    "omegaconf", "accelerate", "peft", "triton", "flash-attn", "liger-kernel", *SERVERS,
    "wandb", "tensorboard", "trackio", "mlflow-skinny",
)  # fmt: skip
_GIT_SECONDS = 10.0  # per call, as a repository may be on a slow disk


def write(folder: Path, config: DictConfig, n_ranks: int, resumed: int) -> None:
    """Write config, command line, versions and commits; those of earlier starts are kept.

    Args:
        config: the config of the whole run, resolved. Its secrets are not written.
        resumed: the step after which the run resumes; 0 for a new run.
    """
    try:
        here = os.getcwd()
    except OSError:  # removed since the start; nothing of the run needs it
        here = None
    about = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_after_step": resumed,
        "command": redact(shlex.join(sys.orig_argv)),
        "working_directory": here and redact(here),
        "host": socket.gethostname(),
        "processes": n_ranks,
        "versions": versions(),
        "git": {
            "RL2": commit(Path(RL2.__file__).parent),
            "working_directory": here and commit(Path(here)),
        },
    }
    old = [folder / name for name in (CONFIG, RUN) if exists(folder / name)]
    if old:
        aside = next(path for n in count(1) if not exists(path := folder / EARLIER / str(n)))
        aside.mkdir(parents=True)
        for path in old:
            path.rename(aside / path.name)
    _write(folder / CONFIG, as_yaml(config))
    _write(folder / RUN, json.dumps(about, indent=1) + "\n")


def as_yaml(config: DictConfig) -> str:
    """A config without its secrets, as a yaml file for `--config-dir` and `--config-name`."""
    trainer = next(name for name, schema in SCHEMAS.items() if schema is schema_of(config))
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    plain = {"defaults": [trainer, "_self_"]} | redact_config(plain)
    return (
        f"# Run again: python -m RL2.trainer.{trainer} --config-dir <this folder> --config-name "
        f"config [key=value ...]\n{OmegaConf.to_yaml(OmegaConf.create(plain))}"
    )


def versions() -> dict[str, str | None]:
    """The versions of Python, of the installed packages that matter, and of CUDA."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found | {"cuda": torch.version.cuda}


def commit(folder: Path) -> dict[str, Any] | None:
    """The commit of the git repository that holds a folder, and whether files differ from it; None
    if there is no repository, or git does not answer."""
    if not (head := _git(folder, "rev-parse", "HEAD")):
        return None
    if not _git(folder, "ls-files"):  # an environment inside an unrelated repository
        return None
    status = _git(folder, "status", "--porcelain")
    return {"commit": head, "dirty": None if status is None else bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=_GIT_SECONDS,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
