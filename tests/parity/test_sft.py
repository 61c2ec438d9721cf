"""SFT against TRL's, from a file of texts to gradients."""

import json

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tests.parity import support
from tests.trainer.support import N_ROWS, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("sft"))


def trl_update(files, **options):
    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
    texts = [{"prompt": row["prompt"], "completion": row["response"]} for row in rows]
    config = SFTConfig(
        output_dir=str(files / "trl"), use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, per_device_train_batch_size=N_ROWS, **options,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32),
        args=config, processing_class=AutoTokenizer.from_pretrained(files / "model"),
        train_dataset=Dataset.from_list(texts),
    )  # fmt: skip
    model = trainer.model.train()
    (inputs,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model, inputs)
    return loss.item(), support.gradients_of(loss, model)


def test_sft(files):
    lines = {
        "actor.model_name": files / "model", "data.path": files / "rows.jsonl",
        "data.max_length": 64, "data.batch_size": N_ROWS,
    }  # fmt: skip
    support.assert_equal(support.ours("sft", lines), trl_update(files))
