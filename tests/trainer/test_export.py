"""Model folders: each weight once, and the ones that were trained."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from RL2.trainer.export import save_model
from tests.ranks import run_on_ranks
from tests.workers.test_actor import make_actor, make_model, whole


def export(model, changes, tokenizer, folder):
    actor = make_actor(model, **changes)
    save_model(actor, tokenizer, folder, "auto")
    return whole(actor)


@pytest.mark.parametrize(
    ("n_ranks", "changes"),
    [(1, {}), (2, {}), (2, {"tp_size": 2}),
     (2, {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear",
                   "seed": 0}})],
)  # fmt: skip
def test_a_tied_head_is_stored_once(tmp_path, tiny_tokenizer, n_ranks, changes):
    model, folder = make_model(tmp_path / "model", "qwen3"), tmp_path / "final"
    held = run_on_ranks(n_ranks, export, model, changes, tiny_tokenizer, folder)[0]
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == load_file(tmp_path / "model/model.safetensors").keys()
    assert "lm_head.weight" not in stored
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    embedding = held["model.embed_tokens.weight"]
    torch.testing.assert_close(loaded.lm_head.weight, embedding, rtol=0, atol=0)
