"""What CUDA decides about number formats: `dtype=auto` computes in the checkpoint's."""

import json
import logging
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from RL2.models.build import load_model
from RL2.models.dtypes import find_dtypes, resolve_attention
from RL2.models.loading import weight_files
from RL2.runtime.errors import ConfigError
from tests.ranks import run_on_ranks
from tests.workers.test_actor import SHAPES, actor_config, as_spo, make_actor, make_batch

HALF = {"bfloat16": torch.bfloat16, "float16": torch.bfloat16}
WHOLE = {"float32": torch.float32, "float64": torch.float32}


def stored_model(folder, dtype, shape="qwen3", said=True):
    """A model in `dtype`; said: whether config.json tells so."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(SHAPES[shape])).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if not said:
        described = json.loads((folder / "config.json").read_text())
        del described["dtype"]
        (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.mark.parametrize("said", [True, False], ids=["said", "not said"])
@pytest.mark.parametrize("stored, computed", (HALF | WHOLE).items())
def test_auto_computes_in_the_checkpoints_dtype(tmp_path, stored, computed, said):
    name = stored_model(tmp_path, stored, said=said)
    model, dtypes, files = load_model(actor_config(name, dtype="auto"), train=True)
    assert dtypes.compute == computed
    assert dtypes.stored == getattr(torch, stored)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert files is not None


def test_a_dtype_that_nothing_is_trained_in(tmp_path):
    """It would be found out when the model is saved. Folders are checked early, hub ids here."""
    name = stored_model(tmp_path, "float32")
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"dtype": "int8"}))
    with pytest.raises(
        ConfigError, match="^actor.model_name: .*dtype=torch.int8, which cannot be trained"
    ):
        load_model(actor_config(name), train=True)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_dtype_that_was_asked_for(tmp_path, asked):
    name = stored_model(tmp_path, "bfloat16")
    _, dtypes, _ = load_model(actor_config(name, dtype=asked), train=False)
    assert (dtypes.compute, dtypes.stored) == (getattr(torch, asked), torch.bfloat16)


def test_fp16_is_said_once_and_only_where_it_is_trained(tmp_path, caplog):
    name = stored_model(tmp_path, "float16")
    with caplog.at_level(logging.WARNING, "RL2"):
        load_model(actor_config(name, dtype="auto"), train=False)
        load_model(actor_config(name, dtype="float32"), train=True)
        assert caplog.messages == []
        load_model(actor_config(name, dtype="auto"), train=True, node="critic")
    (line,) = caplog.messages
    assert line.startswith("critic.dtype=auto:") and line.endswith("computing in bfloat16")


def test_tensors_that_are_stored_otherwise_keep_their_dtype(tmp_path):
    name = stored_model(tmp_path, "bfloat16")
    path = tmp_path / "model.safetensors"
    norm = "model.norm.weight"
    tensors = load_file(path)
    save_file(tensors | {norm: tensors[norm].float()}, path, metadata={"format": "pt"})
    dtypes = find_dtypes("auto", AutoConfig.from_pretrained(name), weight_files(name))
    assert dtypes.saved(norm, "auto") == torch.float32
    assert dtypes.saved("lm_head.weight", "auto") == torch.bfloat16
    assert dtypes.saved(norm, "bfloat16") == torch.bfloat16
    assert dtypes.saved("lm_head.weight", "float32") == torch.float32


def test_attention_follows_from_the_dtype():
    assert resolve_attention("auto", torch.bfloat16) == "flash_attention_2"
    assert resolve_attention("auto", torch.float32) == "sdpa_varlen"
    for asked in ("sdpa_varlen", "eager"):
        assert resolve_attention(asked, torch.float32) == asked
    assert resolve_attention("flash_attention_3", torch.bfloat16) == "flash_attention_3"
    with pytest.raises(ConfigError, match="flash_attention_2: has no kernels for float32.*use"):
        resolve_attention("flash_attention_2", torch.float32)


def test_flash_attention_in_fp32_is_refused_before_weights_are_read(tmp_path):
    name = stored_model(tmp_path, "float32")
    config = actor_config(name, dtype="auto", attn_implementation="flash_attention_2")
    with pytest.raises(ConfigError, match="no kernels for float32"):
        load_model(config, train=True)


def gathered_dtypes(model):
    """Dtypes in which the layers' weights are multiplied in an update."""
    actor, seen = make_actor(model, dtype="auto"), set()

    def note(module, args, out):
        seen.add((module.weight.dtype, out.dtype))

    actor.hf_model.model.layers[0].mlp.up_proj.register_forward_hook(note)
    metrics = actor.update(as_spo(make_batch()), 1)
    assert metrics["actor/grad_norm"] > 0
    return seen, {p.dtype for p in actor.model.parameters()}


@pytest.mark.parametrize("stored, computed", HALF.items())
def test_an_update_multiplies_in_half_precision_and_keeps_fp32_weights(tmp_path, stored, computed):
    ((seen, kept),) = run_on_ranks(1, gathered_dtypes, stored_model(tmp_path, stored))
    assert seen == {(computed, computed)}
    assert kept == {torch.float32}
