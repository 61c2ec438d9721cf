"""Runs of dpo and rm: their numbers against plain transformers, resuming, and what they save."""

import json
import math
import shutil

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from RL2.runtime.errors import ConfigError
from RL2.workers import ShardedModel
from tests.faults.support import Run
from tests.trainer.support import (
    lasting,
    rows_of,
    same_weights,
    train,
    weights,
    write_model,
    write_pairs,
)

EPOCHS = {"trainer__n_epochs": 2, "trainer__save_freq": 1}  # of three steps


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    write_model(files / "model")
    write_model(files / "other", std=0.3)
    write_pairs(files / "pairs.jsonl")
    write_pairs(files / "labels.jsonl", labelled=True)
    return files


@pytest.fixture
def annotated(monkeypatch):
    """How many rows each forward of a frozen model took."""
    counts, annotate = [], ShardedModel.annotate

    def counted(self, batch, fields):
        if self.frozen:
            counts.append(len(batch["states"]))
        return annotate(self, batch, fields)

    monkeypatch.setattr(ShardedModel, "annotate", counted)
    return counts


def texts(files):
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    return [[(row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows]


def summed(folder, pairs, temperature=1.0):
    """Summed log-probabilities [P, 2] of answers with their end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for pair in pairs:
        for prompt, answer in pair:
            prompt = tokenizer.encode(prompt)
            answer = [*tokenizer.encode(answer), tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0] / temperature
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logps.gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found).view(-1, 2)


# ---------------------------------------------------------------- dpo


def test_a_step_is_the_definition_at_the_temperature_of_both_models(files, tmp_path):
    (row,) = train(
        files, "dpo", tmp_path, data__batch_size=12, ref_actor__model_name=files / "other",
        actor__temperature=0.6, actor__loss__label_smoothing=0.1, actor__loss__beta=0.2,
    )  # fmt: skip
    own, ref = (summed(files / name, texts(files), 0.6) for name in ("model", "other"))
    rewards = 0.2 * (own - ref)
    margin = rewards[:, 0] - rewards[:, 1]
    expected = {
        "loss": -(0.9 * logsigmoid(margin) + 0.1 * logsigmoid(-margin)).mean(),
        "margin": margin.mean(),
        "accuracy": (margin > 0).double().mean(),
        "chosen_rewards": rewards[:, 0].mean(),
        "rejected_rewards": rewards[:, 1].mean(),
        "chosen_logps": own[:, 0].mean(),
        "rejected_logps": own[:, 1].mean(),
    }
    for name, value in expected.items():
        assert row[f"actor/{name}"] == pytest.approx(value.item(), rel=1e-5), name
    assert row["actor/accuracy"] == pytest.approx(expected["accuracy"].item(), rel=1e-12)


def test_kto_takes_unrelated_answers_for_its_kl(files, tmp_path):
    path = files / "labels.jsonl"
    (row,) = train(
        files, "dpo", tmp_path, data__path=path, data__batch_size=24, actor__loss__name="kto",
        ref_actor__model_name=files / "other", actor__loss__desirable_weight=1.5,
        trainer__max_steps=1,
    )  # fmt: skip
    loss, rewards = row["actor/loss"], row["actor/rewards"]
    pairs = texts(files)
    ratios = summed(files / "model", pairs) - summed(files / "other", pairs)
    assert rewards == pytest.approx(0.1 * ratios.mean().item(), rel=1e-5)
    kl = row["actor/mismatch_kl"]
    good = 1.5 * (-0.1 * (ratios[:, 0] - kl)).sigmoid()
    bad = (-0.1 * (kl - ratios[:, 1])).sigmoid()
    assert loss == pytest.approx(torch.cat([good, bad]).mean().item(), rel=1e-5)


def test_a_reference_looks_at_each_row_once_and_a_resumed_run_at_none(files, tmp_path, annotated):
    whole = train(files, "dpo", tmp_path / "whole", **EPOCHS)
    assert annotated == [8, 8, 8] and len(whole) == 6
    assert whole[0]["actor/loss"] == pytest.approx(math.log(2), rel=1e-6)
    del annotated[:]
    start = tmp_path / "whole/checkpoints/step000004"
    rows = train(files, "dpo", tmp_path / "on", **EPOCHS, trainer__load_ckpt_from=start)
    assert annotated == []
    assert [*map(lasting, rows)] == [*map(lasting, whole[4:])]
    assert same_weights(weights(tmp_path / "whole/final"), weights(tmp_path / "on/final"))


@pytest.mark.parametrize(
    "change", [{"ref_actor__model_name": "other"}, {"actor__temperature": 0.5}]
)
def test_a_run_that_goes_on_with_another_reference_computes_it_anew(
    files, tmp_path, annotated, change, caplog
):
    train(files, "dpo", tmp_path / "whole", **EPOCHS, trainer__max_steps=4)
    del annotated[:]
    if "ref_actor__model_name" in change:
        change = {"ref_actor__model_name": files / "other"}
    start = tmp_path / "whole/checkpoints/step000004"
    train(files, "dpo", tmp_path / "on", **EPOCHS, **change, trainer__load_ckpt_from=start)
    assert annotated == [8, 8] and "written with another reference" in caplog.text


def test_nothing_is_kept_of_a_reference_that_is_renewed(files, tmp_path, annotated):
    """It is the policy before each step, so that every log-ratio is 0, in the second epoch too."""
    whole = train(files, "dpo", tmp_path / "whole", **EPOCHS, ref_actor__renew_every=1)
    assert [row["actor/loss"] for row in whole] == pytest.approx([math.log(2)] * 6, abs=1e-6)
    assert len(annotated) == 6


def test_one_epoch_keeps_only_what_is_evaluated(files, tmp_path, annotated):
    """In memory: three pairs of twelve, three times."""
    rows = train(files, "dpo", tmp_path, trainer__save_freq=1, trainer__max_steps=2,
                 data__test_ratio=0.25, trainer__test_freq=1)  # fmt: skip
    assert annotated == [6, 8, 8] and all("test/loss" in row for row in rows)
    saved = torch.load(tmp_path / "checkpoints/step000001/rank0.pt")
    assert "references" not in saved["source"][0]


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_load_none(files, tmp_path, annotated, name):
    (row,) = train(files, "dpo", tmp_path, actor__loss__name=name, trainer__max_steps=1)
    assert annotated == [] and math.isfinite(row["actor/loss"])


@pytest.mark.parametrize("loss", ["kto", "bradley_terry"])
def test_a_resumed_run_has_the_same_numbers(files, tmp_path, loss):
    trainer = "dpo" if loss == "kto" else "rm"
    changes = EPOCHS | {"actor__loss__name": loss, "data__batch_size": 8}
    if loss == "kto":
        changes["data__path"] = files / "labels.jsonl"
    whole = train(files, trainer, tmp_path / "whole", **changes)
    start = tmp_path / "whole/checkpoints/step000003"
    rows = train(files, trainer, tmp_path / "on", **changes, trainer__load_ckpt_from=start)
    assert rows and [*map(lasting, rows)] == [*map(lasting, whole[3:])]
    assert same_weights(weights(tmp_path / "whole/final"), weights(tmp_path / "on/final"))


# ---------------------------------------------------------------- models that do not fit


@pytest.mark.parametrize("trainer", ["dpo", "rm"])
def test_a_model_without_tokenizer_files(files, tmp_path, trainer):
    """transformers makes an empty tokenizer of it, for which all texts are the same."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(files / "model" / name, folder)
    with pytest.raises(ConfigError) as error:
        train(files, trainer, tmp_path / "run", actor__model_name=folder)
    assert str(error.value).startswith(f"actor.model_name={folder}: has no tokenizer files")


def test_a_reward_model_is_no_reference(files, tmp_path):
    config = AutoConfig.from_pretrained(files / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scores")
    with pytest.raises(ConfigError) as error:
        train(files, "dpo", tmp_path / "run", ref_actor__model_name=tmp_path / "scores")
    said = f"ref_actor.model_name={tmp_path / 'scores'}: is a Qwen3ForSequenceClassification"
    assert str(error.value).startswith(said)


# ---------------------------------------------------------------- rm


def scores_of(folder, files):
    """As transformers gives them in one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = [prompt + answer for pair in texts(files) for prompt, answer in pair]
    given = tokenizer([one + tokenizer.eos_token for one in answers], padding=True,
                      return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        return model(**given).logits.squeeze(-1).view(-1, 2)


def test_final_is_a_classifier_that_scores_a_padded_batch_as_training_did(files, tmp_path):
    changes = {"data__batch_size": 12, "actor__loss__center_rewards_coefficient": 0.01}
    changes["actor__warmup_ratio"] = 0
    train(files, "rm", tmp_path / "run", trainer__n_epochs=3, **changes)
    final = tmp_path / "run/final"
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert AutoModelForSequenceClassification.from_pretrained(final).num_labels == 1
    scores = scores_of(final, files)
    margin = scores[:, 0] - scores[:, 1]
    # A run that begins with it scores the same rows before its first update.
    (row,) = train(
        files, "rm", tmp_path / "more", **changes, actor__model_name=final, trainer__max_steps=1
    )
    centred = 0.01 * scores.sum(-1).square()
    assert row["actor/loss"] == pytest.approx(
        (centred - logsigmoid(margin)).mean().item(), rel=1e-5
    )
    assert row["actor/margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert row["actor/accuracy"] == (margin > 0).double().mean().item()
    assert row["actor/chosen_rewards"] == pytest.approx(scores[:, 0].mean().item(), abs=1e-6)
    assert row["actor/margin"] > 0.01  # it has learned something


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_a_padding_token_that_ends_no_text(files, tmp_path, pad, caplog):
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.pad_token = pad
    write_model(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = {"actor__model_name": tmp_path / "model", "data__batch_size": 12}
    train(files, "rm", tmp_path / "run", **changes, trainer__n_epochs=2, actor__warmup_ratio=0)
    what = "has no padding token" if pad is None else "pads with an end token"
    assert any(what in line for line in caplog.messages)
    scores = scores_of(tmp_path / "run/final", files)
    changes["actor__model_name"] = tmp_path / "run/final"
    (row,) = train(files, "rm", tmp_path / "more", **changes, trainer__max_steps=1)
    expected = (scores[:, 0] - scores[:, 1]).mean().item()
    assert abs(expected) > 1e-3
    assert row["actor/margin"] == pytest.approx(expected, rel=1e-4)


def test_two_processes_give_the_numbers_of_one(files, tmp_path):
    one = train(files, "rm", tmp_path / "one")
    Run(files, "rm", tmp_path / "two", 2).finish()
    two = rows_of(tmp_path / "two")
    for row, other in zip(one, two, strict=True):
        for name in ("loss", "margin", "accuracy", "chosen_rewards", "grad_norm"):
            expected = pytest.approx(row[f"actor/{name}"], rel=1e-5, abs=1e-7)
            assert other[f"actor/{name}"] == expected, name
