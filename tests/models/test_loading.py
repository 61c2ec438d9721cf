"""Weights are read shard by shard, and are those that transformers would load."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from RL2.models import loading
from RL2.models.build import load_model
from RL2.models.loading import holds_all, model_fingerprint, weight_files
from RL2.runtime.errors import ConfigError
from RL2.workers import ShardedModel
from tests.ranks import run_on_ranks
from tests.workers.test_actor import SHAPES, VOCAB, actor_config, make_model, whole

SPREADS = [(1, {}), (2, {}), (2, {"tp_size": 2}), (2, {"ddp_size": 2}), (4, {"tp_size": 2})]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 5e5,
}  # fmt: skip


def loaded(model, changes):
    actor = ShardedModel(actor_config(model, **changes), torch.device("cpu"))
    buffers = {name: buffer.clone() for name, buffer in actor.hf_model.named_buffers()}
    assert not any(tensor.is_meta for tensor in actor.hf_model.state_dict().values())
    return whole(actor), buffers, actor.hf_model.generation_config.to_dict()


def expect_what_transformers_loads(folder, n_ranks, changes):
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for weights, buffers, generation in run_on_ranks(n_ranks, loaded, str(folder), changes):
        expected = dict(reference.named_parameters())
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), name
        assert buffers.keys() == dict(reference.named_buffers()).keys()
        for name, buffer in reference.named_buffers():
            assert torch.equal(buffers[name], buffer), name
        assert generation == reference.generation_config.to_dict()


@pytest.mark.parametrize("n_ranks, changes", SPREADS)
@pytest.mark.parametrize("shape", ["qwen3", "llama"])
def test_shards_are_what_transformers_loads(tmp_path, shape, n_ranks, changes):
    make_model(tmp_path, shape)
    expect_what_transformers_loads(tmp_path, n_ranks, changes)


def test_bf16_files_in_parts_with_scaled_rope_and_generation_settings(tmp_path):
    torch.manual_seed(0)
    shape = SHAPES["llama"].to_dict() | {"rope_parameters": LLAMA3}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).to(torch.bfloat16)
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expect_what_transformers_loads(tmp_path, 2, {})


def names_and_files(folder):
    files = weight_files(str(folder))
    config = AutoModelForCausalLM.from_pretrained(folder).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return files, model


def test_other_names_or_shapes_are_left_to_transformers(tmp_path):
    make_model(tmp_path)
    files, model = names_and_files(tmp_path)
    assert holds_all(files, model)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights | {"model.norm.gain": norm}, tmp_path / "model.safetensors")
    assert not holds_all(weight_files(str(tmp_path)), model)
    save_file(weights | {"model.norm.weight": norm[1:]}, tmp_path / "model.safetensors")
    assert not holds_all(weight_files(str(tmp_path)), model)


def test_a_folder_without_safetensors_has_no_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert weight_files(str(tmp_path)) == {}
    assert not holds_all({}, AutoModelForCausalLM.from_config(SHAPES["qwen3"]))


def test_experts_that_are_fused_in_memory_are_loaded_whole(tmp_path):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "bos_token_id": None,
        "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape)).save_pretrained(tmp_path)
    expect_what_transformers_loads(tmp_path, 2, {})
    for maps in run_on_ranks(2, mapped_with, str(tmp_path)):
        assert str(tmp_path) not in maps  # its files may change from now on


def mapped_with(model):
    actor = ShardedModel(actor_config(model), torch.device("cpu"))
    assert actor.hf_model.device.type == "cpu"
    return Path("/proc/self/maps").read_text()


def refusal(model, changes):
    try:
        ShardedModel(actor_config(model, **changes), torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return None


def resident(which):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))


def rise(folder):
    """By how many bytes the peak rises."""
    torch.nn.Linear(8, 8)(torch.ones(1, 8)).sum().backward()
    before = resident("VmRSS")
    # Loading alone: the check that follows gathers layer after layer, as each step does.
    with mock.patch("RL2.workers.sharded_model.self_check"):
        actor = ShardedModel(actor_config(folder), torch.device("cpu"))
    assert actor.model is not None
    return resident("VmHWM") - before


def peak(folder, n_ranks):
    return max(run_on_ranks(n_ranks, rise, str(folder), new=True))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_no_rank_holds_the_whole_model(tmp_path):
    config = Qwen3Config(
        vocab_size=16384, hidden_size=768, intermediate_size=3072, num_hidden_layers=4,
        num_attention_heads=12, num_key_value_heads=6, head_dim=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    model = meta.to_empty(device="cpu")
    model.tie_weights()
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    assert size > 150 * 2**20
    # a shard, one tensor in passing, and what the libraries need
    assert peak(tmp_path, 2) < 0.8 * size
    assert peak(tmp_path, 1) > 0.95 * size  # the measurement sees a whole model


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
SPOILT = {
    "missing": (lambda w: w.pop(NORM), f"its files lack 1 of the model's weights, such as {NORM}"),
    "shape": (lambda w: w.update({NORM: w[NORM][1:].clone()}), f"{NORM} has the shape"),
    "integers": (lambda w: w.update({NORM: w[NORM].to(torch.int8)}), f"{NORM} in .* stored as I8"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_weights_that_are_not_the_models(tmp_path, case):
    """transformers would fill them with noise and go on."""
    edit, expected = SPOILT[case]
    make_model(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ConfigError, match=f"^actor.model_name.*{expected}") as caught:
        load_model(actor_config(str(tmp_path)), train=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"hidden_size": -1}, {"num_attention_heads": 0}])
def test_numbers_that_no_model_has(tmp_path, changes):
    make_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        load_model(actor_config(str(tmp_path)), train=False)


def test_fingerprint_is_of_every_tensor(tmp_path, monkeypatch):
    """Also of files that are too large to be read whole."""
    for name in "ab":
        make_model(tmp_path / name)
    path = tmp_path / "b/model.safetensors"
    tensors = load_file(path)
    for read_whole in (True, False):
        if not read_whole:  # the files here are small
            monkeypatch.setattr(loading, "_WHOLE", path.stat().st_size - 1)
            monkeypatch.setattr(loading, "_SAMPLE", 64)
            monkeypatch.setattr(loading, "_OF_TENSOR", 16)
        save_file(tensors, path, {"format": "pt"})
        expected = model_fingerprint(str(tmp_path / "b"))
        assert model_fingerprint(str(tmp_path / "a")) == expected
        seen = set()
        for name, tensor in tensors.items():
            save_file(tensors | {name: tensor + 1}, path, {"format": "pt"})
            seen.add(model_fingerprint(str(tmp_path / "b")))
        assert len(seen) == len(tensors) and expected not in seen


def test_a_generation_config_that_cannot_be(tmp_path):
    """As of a reference policy, whose end tokens nobody asks for."""
    make_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(ConfigError, match="cannot be loaded .*max_new_tokens"):
        load_model(actor_config(str(tmp_path)), train=False)
