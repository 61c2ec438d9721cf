"""A loaded model needs its files no more, and its config.json chooses no code."""

import json
import mmap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3Config, Qwen3MoeConfig

from RL2.models.saved import load_whole, own_memory, saved_config
from RL2.runtime.errors import ConfigError

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
    assert mapped(folder)
    own_memory(model)
    assert not mapped(folder)
    for file in folder.iterdir():
        file.write_bytes(b"")  # would kill a process that reads it through a mapping
    held = model.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def rewrite(folder: Path, change) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


KERNEL = "nobody/nothing"
CHOICES = {
    "attention": {"_attn_implementation": KERNEL},
    "attention, as an argument": {"attn_implementation": KERNEL},
    "attention by part": {"attn_implementation": {"": KERNEL, "text_config": KERNEL}},
    "experts": {"experts_implementation": KERNEL},
    "experts, inside": {"_experts_implementation": "sonicmoe"},
    "other weights": {"transformers_weights": "others.safetensors"},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_chooses_no_code(tmp_path, choice, nested):
    """Of a model that is one, and of one inside of another."""
    text = SHAPE | {"num_experts": 2, "moe_intermediate_size": 8}
    config = Qwen3_5MoeConfig(text_config=text) if nested else CONFIGS["experts"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    expected = load_whole(str(tmp_path), {}, dtype=torch.float32)[0]
    rewrite(tmp_path, lambda content: content.update(CHOICES[choice]))
    if nested:
        rewrite(tmp_path, lambda content: content.get("text_config", {}).update(CHOICES[choice]))
    model = load_whole(str(tmp_path), {}, dtype=torch.float32)[0]
    built = AutoModelForCausalLM.from_config(saved_config(str(tmp_path), {}))
    for one in (model, built):
        assert one.config._attn_implementation == expected.config._attn_implementation
        assert one.config._experts_implementation == expected.config._experts_implementation
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_an_adapter_beside_the_weights_is_not_loaded_on_top(tmp_path):
    """Of a folder the check says so early; of a hub id only the loading can."""
    model = AutoModelForCausalLM.from_config(CONFIGS["tied"])
    model.save_pretrained(tmp_path)
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has full weights and an adapter"):
        load_whole(str(tmp_path), {})
