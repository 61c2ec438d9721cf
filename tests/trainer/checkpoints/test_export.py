"""Model folders: each weight once, and the ones that were trained."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from RL2.runtime.errors import CheckpointError, ConfigError
from RL2.trainer.checkpoints.export import FilesInMemory, save_model, value_of
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


class Copying:
    """Saves itself as tokenizers do that copy their vocabulary from where they were loaded."""

    def __init__(self, source):
        self.source = source

    def save_pretrained(self, folder):
        shutil.copy(self.source, folder)


def test_what_is_kept_is_that_of_the_start(tmp_path):
    source, folder = tmp_path / "tokenizer.model", tmp_path / "final"
    source.write_bytes(b"before")
    kept = FilesInMemory(Copying(source), "actor.model_name=x")
    source.unlink()
    kept.save_pretrained(folder)
    assert (folder / "tokenizer.model").read_bytes() == b"before"
    with pytest.raises(ConfigError) as caught:
        FilesInMemory(Copying(source), "actor.model_name=x")
    assert str(caught.value).startswith("actor.model_name=x: Copying cannot be saved as it was lo")


def misnamed(model, tokenizer, folder):
    """As an adapter would leave it that nobody merged."""
    actor = make_actor(model)
    actor.hf_model.model.layers[0].mlp.up_proj.base_layer = torch.nn.Parameter(torch.ones(2))
    folder.parent.mkdir()
    with pytest.raises(CheckpointError, match="cannot be written .*unexpected_keys: .*base_layer"):
        save_model(actor, tokenizer, folder, "auto")
    return [path.name for path in folder.parent.iterdir()]


def test_a_folder_that_does_not_load_as_it_was_is_not_published(tmp_path, tiny_tokenizer):
    model = make_model(tmp_path / "model", "qwen3")
    ((*left,),) = run_on_ranks(1, misnamed, model, tiny_tokenizer, tmp_path / "run/final")
    assert left == []


def test_an_evaluation_without_a_number_is_not_the_best():
    assert value_of({"test/loss": 2.0, "actor/loss": 1.0}) == ("test/loss", 2.0)
    assert value_of({"test/loss": float("nan")}) is value_of({"actor/loss": 1.0}) is None
    assert value_of({"test/score": float("-inf"), "test/loss": 1.0}) is None
