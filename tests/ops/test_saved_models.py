"""A loaded model needs its files no more, and its config.json chooses no code."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from RL2.ops.saved_models import load_whole

SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "dtype": "float32",
}  # fmt: skip
CONFIGS = {
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "untied": Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "experts": Qwen3MoeConfig(**SHAPE, num_experts=2, moe_intermediate_size=8),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path) -> Path:
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def mapped(folder: Path) -> list[str]:
    """Files of a folder that are mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


def test_mapped_files_are_seen(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with (tmp_path / "file").open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert mapped(tmp_path)
    held.close()
    assert not mapped(tmp_path)


@pytest.mark.parametrize("pickled", [False, True])
def test_nothing_stays_in_the_files(folder, pickled):
    weights = load_file(folder / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    options = {"trust_remote_code": False, "use_safetensors": True}
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        del options["use_safetensors"]
    del weights
    model, _ = load_whole(str(folder), options, dtype=torch.float32)
    assert not mapped(folder)
    for file in folder.iterdir():
        file.write_bytes(b"")  # would kill a process that reads it through a mapping
    held = model.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
