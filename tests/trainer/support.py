"""Tiny runs of the trainers: files they need, composed configs, and the command line."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from RL2.config import register_schemas
from RL2.trainer.main import launch
from tests.conftest import make_tiny_tokenizer
from tests.trainer import preloaded

ROOT = Path(__file__).resolve().parents[2]
N_ROWS = 24

# Rewards what a random model does sometimes, so that a batch has correct and wrong samples.
ENVIRONMENT = """
async def step(state, action, extra_info):
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""


def write_env(path: Path, text: str = ENVIRONMENT) -> Path:
    path.write_text(text)
    return path


def write_rows(path: Path, n_rows: int = N_ROWS) -> Path:
    rows = [
        {"prompt": f"{i} + {3 * i % 7} = ", "response": f"{i + 3 * i % 7}."} for i in range(n_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path, n_rows: int = 12, labelled: bool = False) -> Path:
    """Pairs of answers of different lengths, or each of them with a label."""
    rows = []
    for i in range(n_rows):
        total = i + 3 * i % 7
        row = {"prompt": f"{i} + {3 * i % 7} = ", "chosen": f"{total}.", "rejected": f"{-total}..."}
        if labelled:
            for side in ("chosen", "rejected"):
                label = side == "chosen"
                rows.append({"prompt": row["prompt"], "completion": row[side], "label": label})
        else:
            rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(folder: Path, shape: str = "qwen3", std: float = 0.4, width: int = 32) -> Path:
    """A random model and its tokenizer; a large `std` makes it sure of its tokens."""
    tokenizer = make_tiny_tokenizer()
    ids = {
        "vocab_size": len(tokenizer), "bos_token_id": None, "dtype": "float32",
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": std,
    }  # fmt: skip
    if shape == "qwen3":
        config = Qwen3Config(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4,
            max_position_embeddings=256,
            tie_word_embeddings=True, **ids,
        )  # fmt: skip
    else:  # with dropout, so that a step depends on the state of the random generator
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.1, embd_pdrop=0.1,
            attn_pdrop=0.0, **ids,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_files(folder: Path) -> Path:
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    write_env(folder / "env.py")
    return folder


def overrides(files: Path, trainer: str, save_dir: Path | str, **changes) -> list[str]:
    """Command line of a tiny run; `changes` go by key, a dot written as `__`."""
    common = {
        "actor.model_name": files / "model",
        "actor.lr": 1e-3,
        "actor.gradient_checkpointing": "false",
        "trainer.save_dir": save_dir,
        "trainer.use_wandb": "false",
        "trainer.num_threads": 1,
    }
    if trainer == "sft":
        own = {
            "data.path": files / "rows.jsonl",
            "data.max_length": 64,
            "data.batch_size": 8,
            "actor.max_length_per_device": 512,
        }
    elif trainer in ("dpo", "rm"):
        own = {"data.path": files / "pairs.jsonl", "data.max_length": 64, "data.batch_size": 4}
    else:
        own = {
            "actor.use_liger_kernel": "false",
            "actor.max_length_per_device": 512,
            "train_data.path": files / "rows.jsonl",
            "train_data.prompts_per_rollout": 8,
            "rollout.train_sampling_params.max_new_tokens": 6,
            "rollout.env_path": files / "env.py",
        }
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in (common | own | changed).items()]


def composed(trainer: str, lines: list[str]) -> DictConfig:
    register_schemas()
    with initialize_config_module("RL2.trainer.config", version_base="1.3"):
        return compose(trainer, lines)


def train(files: Path, trainer: str, save_dir: Path, **changes) -> list[dict]:
    """Run a trainer in this process; returns the rows of metrics.jsonl."""
    launch(composed(trainer, overrides(files, trainer, save_dir, **changes)))
    return rows_of(save_dir)


def rows_of(save_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]


def environ(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TORCHELASTIC"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        clean.pop(name, None)
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return clean | changes


def command(
    trainer: str, lines: list[str], n_processes: int = 0, flags: tuple[str, ...] = (), *,
    env: dict[str, str] | None = None, cwd: Path | None = None, fresh: bool = False,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run a trainer as a user does: `python -m`, or `torchrun` with `n_processes`.

    Without `fresh` and torchrun its process is forked from one that has done the imports.
    """
    env, module = env or environ(), f"RL2.trainer.{trainer}"
    if not (fresh or n_processes):
        return preloaded.run(module, [*flags, *lines], env, cwd)
    start = [sys.executable, "-m"]
    if n_processes:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", "-m"]
    return subprocess.run(
        [*start, module, *flags, *lines], env=env, cwd=cwd, capture_output=True, text=True,
        timeout=180, stdin=subprocess.DEVNULL,
    )  # fmt: skip


class NoData:
    """A source without a position."""

    def load_state_dict(self, state):
        pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def checkpoint_tensors(folder: Path) -> dict[str, dict]:
    """Model and optimizer of each learner in a checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    with warnings.catch_warnings():  # that there is no process group, which is so
        warnings.simplefilter("ignore", UserWarning)
        return _load_state_dict_from_keys(storage_reader=FileSystemReader(folder))


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The actor's weights in a checkpoint, under the names that transformers gives them."""
    model = checkpoint_tensors(folder)["actor"]["model"]
    return {name.removeprefix("model."): value for name, value in model.items()}


def same_weights(one: dict, other: dict) -> bool:
    """Whether all weights that both name are bit-equal, and both name some."""
    shared = one.keys() & other.keys()
    return bool(shared) and all(torch.equal(one[name], other[name]) for name in shared)


def lasting(row: dict) -> dict:
    """A row of metrics without what depends on the machine's mood."""
    moody = ("timing/", "memory/", "rollout/tokens_per_s")
    return {name: value for name, value in row.items() if not name.startswith(moody)}
