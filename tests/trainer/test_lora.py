"""Whole runs that train adapters: plain models for others, adapters for peft, exact resumption."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.runtime.errors import CheckpointError
from tests.trainer.support import (
    checkpoint_weights,
    lasting,
    same_weights,
    train,
    weights,
    write_files,
    write_model,
)

# The learning rate of tiny adapters; dropout makes a step depend on the random generator's state.
LORA = {"actor__lora__rank": 4, "actor__lr": "5e-2", "trainer__n_epochs": 2}
SFT = LORA | {"actor__lora__dropout": 0.3, "trainer__save_freq": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def spo_run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spo")
    rows = train(
        files, "spo", folder, **LORA, test_data__path=files / "rows.jsonl", trainer__test_freq=6,
        test_data__max_examples=8,
    )  # fmt: skip
    return folder, rows


@pytest.fixture(scope="module")
def sft_run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return folder, train(files, "sft", folder, **SFT)


def test_the_engine_serves_the_merged_model_and_final_is_it(spo_run, files):
    """Greedy answers of `final`, made without peft and the library, are those of the last
    evaluation, and others than at the start."""
    folder, rows = spo_run
    assert all(math.isfinite(value) for row in rows for value in row.values())
    # The KL between what sampled and what trains: another computation of the same function.
    assert max(row.get("rollout/llm_kl", 0.0) for row in rows) < 1e-8
    first, last = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (folder / f"rollouts/step{step:06d}_test.jsonl" for step in (0, 6))
    )
    assert first != last
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    for record in last:
        ids = tokenizer(record["prompt"], add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0]
        text = tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == record["response"]


def test_final_differs_in_the_linear_layers_and_peft_adds_the_same_to_the_base(spo_run, files):
    folder = spo_run[0] / "final"
    before, after = weights(files / "model"), weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if "_proj" in name}
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(files / "model")
    final = AutoModelForCausalLM.from_pretrained(folder)
    states = torch.arange(40)[None]
    with torch.no_grad():
        expected = final(states).logits
        scale = expected.abs().max()
        assert (adapted(states).logits - expected).abs().max() < 1e-5 * scale
        with adapted.disable_adapter():
            assert (adapted(states).logits - expected).abs().max() > 1e-2 * scale


def test_checkpoints_hold_what_is_trained(sft_run):
    saved = checkpoint_weights(sft_run[0] / "checkpoints/step000006")
    assert len(saved) == 28 and all(".lora_" in name for name in saved)


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_run_is_the_run_that_was_not_stopped(files, sft_run, tmp_path, step):
    """Bit for bit; `step` 4 lies in the second epoch."""
    whole, expected = sft_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    for path in (folder / "checkpoints").glob("step*"):
        if path.name > f"step{step:06d}":
            shutil.rmtree(path)
    rows = train(files, "sft", folder, **SFT, trainer__load_ckpt_from="latest")
    assert list(map(lasting, rows)) == list(map(lasting, expected))
    assert len({row["actor/loss"] for row in rows}) == len(rows) == 6
    assert same_weights(weights(folder / "final"), weights(whole / "final"))
    adapters = (path / "final/adapter/adapter_model.safetensors" for path in (folder, whole))
    assert len({path.read_bytes() for path in adapters}) == 1


@pytest.mark.parametrize(
    "changes",
    [{"actor__lora__rank": "null", "actor__lora__dropout": 0.0}, {"actor__lora__rank": 2}],
    ids=["without", "other rank"],
)
def test_a_checkpoint_of_other_adapters_does_not_load(files, sft_run, tmp_path, changes):
    which = sft_run[0] / "checkpoints/step000002"
    with pytest.raises(CheckpointError, match="step000002 does not load") as caught:
        train(files, "sft", tmp_path, **SFT | changes, trainer__load_ckpt_from=which)
    assert "\n" not in str(caught.value)


def test_adapters_beside_layers_of_another_family(files, tmp_path):
    """GPT-2, whose layers keep the transposed weight, in bfloat16."""
    write_model(tmp_path / "gpt2", "gpt2", std=0.2)
    changes = LORA | {"actor__model_name": tmp_path / "gpt2", "actor__dtype": "bfloat16"}
    rows = train(files, "sft", tmp_path / "run", **changes)
    assert rows[-1]["actor/loss"] < 0.9 * rows[0]["actor/loss"]
    after, before = weights(tmp_path / "run/final"), weights(tmp_path / "gpt2")
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert len(changed) == 8 and all(".c_" in name for name in changed)
