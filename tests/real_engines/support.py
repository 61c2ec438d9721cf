"""Models that every engine accepts, and where the engines' interpreters are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from RL2.config import apply_fallbacks, validate
from RL2.engines.protocol import Completion
from RL2.engines.servers.addresses import HOST
from RL2.engines.servers.dialect import Dialect
from RL2.engines.servers.http import Server
from RL2.engines.servers.process import ServerOptions, ServerProcess, wait_until_healthy
from RL2.runtime.event_loop import EventLoopThread
from tests.rollout.support import EOS, PAD, VOCAB, make_tokenizer
from tests.trainer.support import ENVIRONMENT, composed

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("sglang_stand_in")


CONTEXT = 512  # of the models here
TOLERANCE = 1e-4  # nats, fp32
# A generation config that would change every sample if a server took it over.
TRAPS = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 3.0}


@contextmanager
def served_by(
    dialect: Dialect, options: ServerOptions, log: Path, port: int, key: str, **variables: str
) -> Iterator[tuple[ServerProcess, Server, EventLoopThread]]:
    """A real server that answers, how to talk to it, and the event loop to do so on.

    variables: of the server's environment, beside the dialect's.
    """
    loop = EventLoopThread()
    process = ServerProcess(
        dialect.command(options, port), dialect.environment(options, key) | variables, log
    )
    server = Server(f"http://{HOST}:{port}", dialect.headers(key))
    try:
        loop.run(wait_until_healthy(server, process, dialect.health_path, dialect.name, 250.0))
        yield process, server, loop
    finally:
        loop.run(server.close())
        loop.run(process.stop())
        loop.close()


def in_the_middle(attempt: Callable[[float], int], delay: float = 0.3) -> None:
    """Call `attempt` with one delay after the other until it met requests that were half written.

    How long that takes depends on the machine and on what else it does: any fixed delay is too
    short on one and too long on another.

    attempt: takes seconds to wait before it interferes; returns a negative number where nothing was
        written yet, a positive one where everything was, and 0 in the middle. It checks all that
        holds in any of the three itself.
    """
    tried = []
    for _ in range(12):
        tried.append(f"{delay:.3g} s")
        outcome = attempt(delay)
        if outcome == 0:
            return
        delay *= 2 if outcome < 0 else 0.3  # the powers never meet: no two delays are tried in turn
    pytest.fail(f"no request was met half written after {', '.join(tried)}")


def side_of_abort(completions: Iterable[Completion]) -> int:
    """What `in_the_middle` wants to know of an abort."""
    aborted = [c for c in completions if c.finish_reason == "abort"]
    if any(c.token_ids for c in aborted):
        return 0
    return -1 if aborted else 1


def side_of_update(versions: Iterable[list[int]], before: int) -> int:
    """What `in_the_middle` wants to know of an update of weights.

    versions: of each response, the version of the weights behind each of its tokens.
    before: the version before the update.
    """
    versions = [v for v in versions if v]
    if any(0 < v.count(before) < len(v) for v in versions):
        return 0
    return 1 if any(before in v for v in versions) else -1


def engine_python(name: str) -> str:
    """Interpreter of the engine's own environment; skips the test where there is none.

    name: "vllm" or "sglang".
    """
    python = ROOT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venv-{name}: make it with `bash tests/real_engines/setup.sh {name}`")
    return str(python)


def engine_config(family: str = "qwen3", *, tied: bool = True) -> PretrainedConfig:
    """2 layers, 4 heads of 32 (vLLM's CPU attention refuses 8 and 16), 259 tokens (no multiple of
    64, so that engines pad the embedding), 512 positions."""
    common = dict(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
        initializer_range=0.2, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=EOS,
        pad_token_id=PAD, dtype="float32",
    )  # fmt: skip
    return LlamaConfig(**common) if family == "llama" else Qwen3Config(**common)


def make_engine_model(
    path: Path, *, family: str = "qwen3", tied: bool = True, seed: int = 0, **generation: object
) -> str:
    """Save a random fp32 model and the byte tokenizer; returns the folder.

    generation: entries of the generation config, for example `eos_token_id=[1, 60]`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(engine_config(family, tied=tied))
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@dataclass(frozen=True)
class EngineRun:
    """A run that generates with an engine. lines: overrides of `ppo`. variables: what its servers
    need in the environment."""

    engine: str
    lines: list[str]
    variables: dict[str, str]
    save_dir: Path

    def config(self) -> DictConfig:
        """Composed, validated and resolved."""
        config = composed("ppo", self.lines)
        validate(config, 1)
        apply_fallbacks(config, cuda=False, available=set())
        OmegaConf.resolve(config)
        return config


def engine_run(engine: str, model: str, root: Path, **changes: object) -> EngineRun:
    """A tiny run in `root`; skips the test where the engine's environment is missing.

    engine: "transformers", "vllm" or "sglang" (SGLang on CPU, with the kernel stand-in).
    changes: further keys, a dot written as `__`.
    """
    (root / "env.py").write_text(ENVIRONMENT)
    lines = {
        "train_data.path": "null", "train_data.prompts_per_rollout": 8,
        "actor.model_name": model, "actor.max_length_per_device": 512,
        "rollout.train_sampling_params.max_new_tokens": 64, "rollout.env_path": root / "env.py",
        "rollout.engine": engine, "trainer.save_dir": root / "run", "trainer.use_wandb": "false",
    }  # fmt: skip
    variables = {}
    if engine != "transformers":
        lines["rollout.server_python"] = engine_python(engine)
    if engine == "sglang":
        variables["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(STAND_IN), os.environ.get("PYTHONPATH")])
        )
    lines |= {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={value}" for key, value in lines.items()]
    return EngineRun(engine, overrides, variables, Path(lines["trainer.save_dir"]))
