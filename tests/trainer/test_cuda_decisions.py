"""Runs with what is decided for a CUDA machine, on the CPU: dtypes, attention, offloading."""

import json
import logging

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from RL2.config import apply_fallbacks, validate
from RL2.distributed import process_group
from RL2.trainer.loop import Trainer
from tests.trainer.support import composed, overrides, rows_of, train, weights, write_files

OFFLOAD = {"actor__offload_model": "true", "actor__offload_optimizer": "true"}


def files_of(folder, dtype):
    files = write_files(folder)
    model = AutoModelForCausalLM.from_pretrained(files / "model").to(getattr(torch, dtype))
    model.save_pretrained(files / "model")
    return files


def train_as_on_cuda(files, trainer, save_dir, **changes):
    config = composed(trainer, overrides(files, trainer, save_dir, **changes))
    validate(config, 1)
    lines = apply_fallbacks(config, cuda=True, available=set())
    OmegaConf.resolve(config)
    for node in map(config.get, ("actor", "ref_actor", "critic", "teacher")):
        if node is not None:
            assert node.device == "cuda"
            node.device = "cpu"
    with process_group("cpu") as device:
        run = Trainer(config, device)
        try:
            run.train()
        finally:
            run.close()
    return run, lines


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_run_computes_and_serves_and_saves_what_the_checkpoint_says(tmp_path, stored):
    files, save_dir = files_of(tmp_path, stored), tmp_path / "run"
    changes = {"actor__kl__coef": 0.01, "actor__kl__type": "loss", "trainer__max_steps": 2}
    run, lines = train_as_on_cuda(files, "ppo", save_dir, **changes, **OFFLOAD)
    assert [line.partition(":")[0] for line in lines] == ["rollout.engine=auto"]
    computed = torch.float32 if stored == "float32" else torch.bfloat16
    assert {each.__self__.dtypes.compute for each in run.providers.values()} == {computed}
    assert run.config.rollout.dtype == str(computed).removeprefix("torch.")
    rows = rows_of(save_dir)
    assert all(row["actor/grad_norm"] > 0 for row in rows)
    assert max(row["rollout/llm_kl"] for row in rows) < (0.01 if computed.itemsize == 2 else 1e-9)
    after = weights(save_dir / "final")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, stored)}
    described = json.loads((save_dir / "final/config.json").read_text())
    assert described == json.loads((files / "model/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(save_dir / "final", dtype="auto")
    assert loaded.dtype == getattr(torch, stored)


@pytest.mark.parametrize(
    "asked, saved",
    [
        ({}, torch.bfloat16),
        ({"trainer__save_dtype": "float32"}, torch.float32),
        ({"actor__dtype": "float32"}, torch.float32),
        ({"actor__dtype": "float32", "trainer__save_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=["auto", "save_dtype", "dtype", "both"],
)
def test_final_is_in_the_checkpoints_dtype_unless_asked(tmp_path, asked, saved):
    files, save_dir = files_of(tmp_path, "bfloat16"), tmp_path / "run"
    rows = train(files, "sft", save_dir, trainer__max_steps=1, **asked)
    assert rows[-1]["actor/grad_norm"] > 0
    assert {tensor.dtype for tensor in weights(save_dir / "final").values()} == {saved}
    described = json.loads((save_dir / "final/config.json").read_text())
    assert described["dtype"] == str(saved).removeprefix("torch.")


@pytest.mark.parametrize("built_for", ["13.0", None])
def test_a_torch_for_gpus_without_one_says_so_and_goes_on(tmp_path, monkeypatch, caplog, built_for):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    files = write_files(tmp_path)
    with caplog.at_level(logging.INFO, "RL2"):
        rows = train(files, "sft", tmp_path / "run", trainer__max_steps=1)
    assert len(rows) == 1
    said = [line for line in caplog.messages if "no GPU found" in line]
    assert len(said) == (built_for is not None)
