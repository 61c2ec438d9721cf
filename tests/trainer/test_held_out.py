"""Rows that are held out and evaluated: which ones, their loss, and what it leaves unchanged."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.datasets import Items, held_out
from RL2.runtime.errors import CheckpointError, RL2Error
from tests.trainer.support import (
    N_ROWS,
    train,
    weights,
    write_files,
    write_model,
    write_pairs,
)

TESTED = {"data__test_ratio": 0.25, "trainer__test_freq": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def losses_of_rows(files, model: str = "model") -> list[torch.Tensor]:
    """The negative log-likelihood of each learned token, by row, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    model = AutoModelForCausalLM.from_pretrained(files / model).double().eval()
    found = []
    for line in (files / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, response = (tokenizer(row[key])["input_ids"] for key in ("prompt", "response"))
        ids = torch.tensor([*prompt, *response, tokenizer.eos_token_id])
        with torch.no_grad():
            logps = model(ids[None, :-1]).logits[0].log_softmax(-1)
        found.append(-logps.gather(-1, ids[1:, None])[len(prompt) - 1 :, 0])
    return found


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(files, "sft", folder, **TESTED, trainer__save_freq=1)


def test_loss_at_step_0_is_that_of_the_held_out_rows(files, run, tmp_path):
    """The mean over all tokens, not over rows or packs; with avg_level=sequence that over rows."""
    items = Items([{"x": i} for i in range(N_ROWS)])
    train_part, test_part = held_out(items, 0.25, seed=0)
    of_rows = losses_of_rows(files)
    chosen = [of_rows[i] for i in test_part.indices]
    assert len(chosen) == 6 and sorted(train_part.indices + test_part.indices) == [*range(N_ROWS)]
    start = run[1][0]
    assert start["step"] == 0
    assert start["test/loss"] == pytest.approx(torch.cat(chosen).mean().item(), rel=1e-5)
    assert {"test/entropy", "test/p_max"} <= start.keys()
    rows = train(
        files, "sft", tmp_path, **TESTED, actor__avg_level="sequence", trainer__max_steps=1,
        actor__max_length_per_device=64,
    )  # fmt: skip
    expected = torch.stack([one.mean() for one in chosen]).mean().item()
    assert rows[0]["test/loss"] == pytest.approx(expected, rel=1e-5)


def test_steps_and_best(run):
    folder, rows = run
    assert [row["step"] for row in rows] == [0, 1, 2, 3]  # of 18 rows, 8 a step
    assert all("test/loss" in row for row in rows)
    best = min(rows, key=lambda row: row["test/loss"])["step"]
    assert best > 0 and (folder / "best").is_dir()


def test_evaluating_changes_nothing_of_training(files, tmp_path):
    """GPT-2 with dropout: a step depends on the random generator."""
    write_model(tmp_path / "model", "gpt2")
    (tmp_path / "rows.jsonl").write_text((files / "rows.jsonl").read_text())
    options = {
        "data__test_ratio": 0.25, "actor__dropout": "null", "trainer__max_steps": 2,
        "trainer__keep_best": "false",
    }  # fmt: skip
    often = train(tmp_path, "sft", tmp_path / "often", **options, trainer__test_freq=1)
    rarely = train(tmp_path, "sft", tmp_path / "rarely", **options, trainer__test_freq=9)
    for one, other in zip(often[1:], rarely[1:], strict=True):
        same = {name for name in other if not name.startswith(("timing/", "memory/"))}
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
    ours, theirs = weights(tmp_path / "often/final"), weights(tmp_path / "rarely/final")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_goes_on_with_the_same_rows(files, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    for later in ("step000002", "step000003"):
        shutil.rmtree(folder / "checkpoints" / later)
    options = {"trainer__load_ckpt_from": "latest", "trainer__save_freq": 1}
    resumed = train(files, "sft", folder, **TESTED, **options)
    for row, other in zip(resumed, run[1], strict=True):
        names = {name for name in other if name.startswith(("test/", "actor/", "train/"))}
        assert {name: row[name] for name in names} == {name: other[name] for name in names}
    with pytest.raises(CheckpointError, match="data.test_ratio"):
        train(files, "sft", folder, **(TESTED | {"data__test_ratio": 0.5}), **options)


def test_rows_of_another_file(files, tmp_path):
    lines = (files / "rows.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:3]))
    options = {"data__test_path": tmp_path / "test.jsonl", "trainer__test_freq": 1}
    rows = train(files, "sft", tmp_path / "run", **options, trainer__max_steps=1)
    expected = torch.cat(losses_of_rows(files)[:3]).mean().item()
    assert rows[0]["test/loss"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "test.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(RL2Error, match="^data.test_path: .*test.jsonl:1: row without response"):
        train(files, "sft", tmp_path / "other", **options)


@pytest.mark.parametrize(("ratio", "what"), [(0.01, "evaluate"), (0.99, "train on")])
def test_a_side_without_rows(files, tmp_path, ratio, what):
    with pytest.raises(RL2Error) as caught:
        train(files, "sft", tmp_path, data__test_ratio=ratio, trainer__test_freq=1)
    text = f"data.test_ratio={ratio}: leaves no row to {what}, as data.path has 24; "
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "bradley_terry"])
def test_preferences_are_measured_as_in_training(tmp_path, loss):
    """A test set that is the whole training set has, before the first step, the numbers of a step
    that takes all rows."""
    write_model(tmp_path / "model")
    write_model(tmp_path / "other", std=0.3)
    write_pairs(tmp_path / "pairs.jsonl", labelled=loss == "kto")
    options = {
        "data__batch_size": 24, "trainer__max_steps": 1, "trainer__test_freq": 1,
        "data__test_path": tmp_path / "pairs.jsonl", "data__path": tmp_path / "pairs.jsonl",
    }  # fmt: skip
    if loss != "bradley_terry":
        options |= {"actor__loss__name": loss, "ref_actor__model_name": tmp_path / "other"}
    trainer = "rm" if loss == "bradley_terry" else "dpo"
    before, step = train(tmp_path, trainer, tmp_path / "run", **options)
    of_step = {n.removeprefix("actor/"): step[n] for n in step if n.startswith("actor/")}
    for name in ("grad_norm", "lr", "skipped", "nonfinite"):
        del of_step[name]
    assert {"loss", "accuracy"} <= of_step.keys() and (loss == "kto" or "margin" in of_step)
    found = {n.removeprefix("test/"): x for n, x in before.items() if n.startswith("test/")}
    assert found == pytest.approx(of_step, rel=1e-5, abs=1e-6)
