"""Reward models against TRL's, from a file of texts to gradients."""

import json

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from tests.parity import support
from tests.trainer.support import write_files

N_ROWS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("rm"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "scorer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "scorer")
    rows = [
        {"prompt": f"{i} + 2 = ", "chosen": f"{i + 2}." * (1 + i % 3), "rejected": f"{10 * i}!?"}
        for i in range(N_ROWS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trl_update(files, **options):
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    config = RewardConfig(
        output_dir=str(files / "trl"), use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, per_device_train_batch_size=N_ROWS, **options,
    )  # fmt: skip
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(files / "scorer"), args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(files / "scorer"),
    )  # fmt: skip
    model = trainer.model.train()
    (inputs,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model, inputs)
    return loss.item(), support.gradients_of(loss, model)


@pytest.mark.parametrize("coefficient", [None, 0.05])
def test_rm(files, coefficient):
    lines = {
        "actor.model_name": files / "scorer", "data.path": files / "pairs.jsonl",
        "data.max_length": 64, "data.batch_size": N_ROWS,
        "actor.loss.center_rewards_coefficient": coefficient or 0.0,
    }  # fmt: skip
    wanted = trl_update(files, center_rewards_coefficient=coefficient)
    support.assert_equal(support.ours("rm", lines), wanted)
