"""The engines under test: the embedded one, and real servers where their environments are."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from RL2.engines.protocol import Engine
from RL2.engines.registry import build_engine
from RL2.runtime.event_loop import EventLoopThread
from tests.real_engines.support import engine_run, make_engine_model
from tests.rollout.support import make_tokenizer

ENGINES = ("transformers", "vllm", "sglang")


@dataclass
class Running:
    """A started engine. folder: of the model it was started with. other: of one with other
    weights."""

    name: str
    engine: Engine
    loop: EventLoopThread
    folder: str
    other: str

    def run(self, coroutine):
        return self.loop.run(coroutine)

    def model(self, folder: str | None = None) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder or self.folder).eval()

    def publish(self, folder: str, version: int) -> None:
        model = self.model(folder)
        self.run(self.engine.update_weights(model.named_parameters(), version))


@pytest.fixture(scope="package", params=ENGINES)
def running(request, tmp_path_factory):
    """One engine for all tests of the suite; a test that changes its weights puts them back."""
    root: Path = tmp_path_factory.mktemp(request.param)
    eos = [1, *range(60, 64)]  # one token in fifty ends a response
    folder = make_engine_model(root / "model", eos_token_id=eos)
    other = make_engine_model(root / "other", seed=1, eos_token_id=eos)
    run = engine_run(request.param, folder, root)
    before = dict(os.environ)
    os.environ.update(run.variables)
    loop = EventLoopThread()
    try:
        engine = build_engine(run.config(), make_tokenizer(), torch.device("cpu"))
        loop.run(engine.start())
        yield Running(request.param, engine, loop, folder, other)
        loop.run(engine.close())
    finally:
        loop.close()
        os.environ.clear()
        os.environ.update(before)
