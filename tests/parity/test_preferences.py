"""Losses over pairs and labels against TRL's trainers, from a file of texts to gradients."""

import json
import os

import pytest

pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from tests.parity import support
from tests.trainer.support import write_files

N_ROWS = 8
LENGTH = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("preferences"))
    pairs = [
        {"prompt": f"{i} + 2 = ", "chosen": f"{i + 2}." * (1 + i % 3), "rejected": f"{10 * i}!?"}
        for i in range(N_ROWS)
    ]
    labels = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if i % 3 else "rejected"],
            "label": i % 3 > 0,
        }
        for i, row in enumerate(pairs)
    ]
    for name, rows in (("pairs", pairs), ("one_pair", pairs[:1]), ("labels", labels)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return support.write_policies(folder) | {"folder": folder}


def trl_update(files, name, make_config, make_trainer, **options):
    rows = [
        json.loads(line) for line in (files["folder"] / f"{name}.jsonl").read_text().splitlines()
    ]
    refers = make_trainer in (DPOTrainer, KTOTrainer)
    config = make_config(
        output_dir=str(files["folder"] / "trl"), use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, per_device_train_batch_size=len(rows), **options,
    )  # fmt: skip
    models = {"model": files["new"]} | ({"ref_model": files["ref"]} if refers else {})
    trainer = make_trainer(
        **{name: AutoModelForCausalLM.from_pretrained(path) for name, path in models.items()},
        args=config, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(files["folder"] / "model"),
    )  # fmt: skip
    model = trainer.model.train()
    (inputs,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model, inputs)
    if make_trainer is KTOTrainer:
        assert trainer._metrics["train"]["kl"][0] > 0.1
    return loss.item(), support.gradients_of(loss, model)


def our_update(files, name, loss, **options):
    lines = {
        "actor.model_name": files["new"], "data.path": files["folder"] / f"{name}.jsonl",
        "data.max_length": LENGTH, "data.batch_size": N_ROWS, "actor.loss.name": loss,
    }  # fmt: skip
    lines |= {f"actor.loss.{key}": value for key, value in options.items()}
    return support.ours("dpo", lines, reference=files["ref"])


DPO = {  # the rows, what TRL is told, the name of our loss and its options
    "sigmoid": ("pairs", {"loss_type": "sigmoid", "beta": 0.3}, "dpo", {"beta": 0.3}),
    "ipo": (
        "pairs", {"loss_type": "ipo", "beta": 0.3}, "ipo",
        {"beta": 0.3, "length_normalized": "true"},
    ),
    # TRL's sigmoid has no label smoothing. This one has, and is the same for a single pair.
    "label smoothing": (
        "one_pair", {"loss_type": "aot", "beta": 0.3, "label_smoothing": 0.1}, "dpo",
        {"beta": 0.3, "label_smoothing": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DPO)
def test_dpo(files, name):
    rows, options, loss, ours = DPO[name]
    wanted = trl_update(files, rows, DPOConfig, DPOTrainer, **options)
    support.assert_equal(our_update(files, rows, loss, **ours), wanted)


def test_kto(files):
    """With a policy whose estimated KL is above 0."""
    files = files | {"new": files["ref"], "ref": files["new"]}
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    wanted = trl_update(files, "labels", KTOConfig, KTOTrainer, beta=0.3, **weights)
    support.assert_equal(our_update(files, "labels", "kto", beta=0.3, **weights), wanted)


@pytest.fixture(scope="module")
def experimental():
    """Trainers that TRL may change at any time, and warns of."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return {"simpo": (CPOConfig, CPOTrainer), "orpo": (ORPOConfig, ORPOTrainer)}


def test_simpo(files, experimental):
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.6, "beta": 1.5}
    wanted = trl_update(files, "pairs", *experimental["simpo"], **options)
    support.assert_equal(our_update(files, "pairs", "simpo", beta=1.5, gamma=0.6), wanted)


def test_orpo(files, experimental):
    """Of the two terms the odds ratio: TRL's likelihood is that of the prompts as well."""
    make = experimental["orpo"]
    theirs = [trl_update(files, "pairs", *make, beta=beta) for beta in (1e-9, 0.5)]
    ours = [our_update(files, "pairs", "orpo", beta=beta) for beta in (1e-9, 0.5)]
    support.assert_equal(support.difference(*ours), support.difference(*theirs), rtol=3e-5)
