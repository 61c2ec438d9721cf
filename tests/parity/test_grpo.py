"""GRPO and its relatives against TRL's, from rewards to gradients."""

import os

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from tests.parity import support
from tests.parity.support import GROUPS, LONGEST, RESPONSES, TEMPERATURE
from tests.trainer.support import write_files

N_SAMPLES = GROUPS * RESPONSES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("parity"))
    return support.write_policies(folder) | {"folder": folder}


@pytest.fixture(scope="module")
def rows():
    return support.make_rows(vocab=256)


def trl_update(files, rows, name, **options):
    """TRL's own code from rewards on: advantages, the log-probabilities of the old policy and of
    the reference, and the loss of the new one. What it would generate is given."""
    prompts = [f"{row.group}" for row in rows]
    make_config, make_trainer = (
        (GMPOConfig, GMPOTrainer) if name == "gmpo" else (GRPOConfig, GRPOTrainer)
    )
    config = make_config(
        output_dir=str(files["folder"] / "trl"), use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, per_device_train_batch_size=N_SAMPLES,
        num_generations=RESPONSES, max_completion_length=LONGEST, temperature=TEMPERATURE,
        num_iterations=2, **options,
    )  # fmt: skip
    trainer = make_trainer(
        model=AutoModelForCausalLM.from_pretrained(files["old"]), args=config,
        processing_class=AutoTokenizer.from_pretrained(files["folder"] / "model"),
        reward_funcs=lambda prompts, **_: [row.reward for row in rows],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )  # fmt: skip
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(
            AutoModelForCausalLM.from_pretrained(files["ref"]).state_dict()
        )
    responses = [row.response for row in rows]
    trainer._tokenize_prompts = lambda _: ([row.prompt for row in rows], None, {})
    trainer._generate_single_turn = lambda *_: (responses, None)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(files["new"]).state_dict())
    loss = trainer.compute_loss(model, inputs)
    return loss.item(), support.gradients_of(loss, model)


def our_update(files, rows, lines):
    own = {
        "actor.model_name": files["new"], "actor.temperature": TEMPERATURE, "actor.tis_coef": 0.0,
        "train_data.path": files["folder"] / "rows.jsonl",
        "train_data.prompts_per_rollout": GROUPS, "train_data.responses_per_prompt": RESPONSES,
        "rollout.env_path": files["folder"] / "env.py",
        "rollout.train_sampling_params.max_new_tokens": LONGEST,
    }  # fmt: skip
    return support.ours("ppo", own | lines, support.our_batch(rows), files["old"], files["ref"])


# TRL's loss as a multiple of ours, from the rows, where the definitions differ.
def same(rows):
    return 1.0


def epsilon(rows):
    """TRL adds 1e-4 to the standard deviation that divides an advantage."""
    spread = torch.tensor([row.reward for row in rows[:RESPONSES]]).std().item()
    return spread / (spread + 1e-4)


def all_tokens(rows):
    """TRL divides by the tokens that the responses might have had, ours by those they have."""
    return sum(len(row.response) for row in rows) / (N_SAMPLES * LONGEST)


def sequences(rows):
    """TRL divides a sum over tokens by the responses, ours by the tokens."""
    return sum(len(row.response) for row in rows) / N_SAMPLES


SEQUENCE, TOKEN = {"actor.avg_level": "sequence"}, {"actor.avg_level": "token"}
NORM, RAW = {"adv.norm_var": "true"}, {"scale_rewards": "none"}
KL = {"actor.kl.coef": 0.1, "actor.kl.type": "loss", "actor.kl.loss_estimator": "k3"}
OWN = "tests/parity/losses.py"
CASES = {  # what TRL is told, what ours is told, and the factor
    "grpo": ({"loss_type": "grpo"}, SEQUENCE | NORM, epsilon),
    "grpo, KL": (
        RAW | {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
        SEQUENCE | KL, same,
    ),
    "grpo, unbiased KL": (
        RAW | {"loss_type": "grpo", "beta": 0.1},
        SEQUENCE | KL | {"actor.kl.unbiased": "true"}, same,
    ),
    "bnpo": ({"loss_type": "bnpo"}, TOKEN | NORM, epsilon),
    "dr_grpo": (RAW | {"loss_type": "dr_grpo"}, TOKEN, all_tokens),
    "dapo": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        TOKEN | NORM | {"actor.loss.clip_high": 0.28}, epsilon,
    ),
    "dapo, entropy": (
        RAW | {"loss_type": "dapo", "entropy_coef": 0.05},
        TOKEN | {"actor.entropy.coef": 0.05}, same,
    ),
    "gspo": (
        {
            "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02,
            "epsilon_high": 0.03,
        },
        {"algorithm": "gspo", "actor.loss.clip_low": 0.02, "actor.loss.clip_high": 0.03}, epsilon,
    ),
    "gmpo": (
        {"epsilon": 0.1, "epsilon_high": 0.1},
        {"algorithm": "gmpo", "actor.loss.clip_low": 0.1, "actor.loss.clip_high": 0.1}, epsilon,
    ),
    "cispo": (  # TRL's bound is that of the ratio
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"algorithm": "cispo", "actor.loss.clip_high": 0.1}, epsilon,
    ),
    "sapo": ({"loss_type": "sapo"}, {"algorithm": "sapo"}, epsilon),
    "dual clip": (
        RAW | {"loss_type": "dapo", "delta": 1.25},
        {"algorithm": "dual_clip", "actor.loss.dual_clip": 1.25}, same,
    ),
    "entropy_80_20": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.2},
        {"algorithm": "entropy_80_20"}, epsilon,
    ),
    "luspo": (
        RAW | {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05},
        TOKEN | {"actor.loss.import_path": f"{OWN}:luspo", "actor.loss.options.clip": 0.05},
        sequences,
    ),
    "vespo": (
        RAW | {"loss_type": "vespo"}, TOKEN | {"actor.loss.import_path": f"{OWN}:vespo"}, same,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_grpo(files, rows, name):
    options, lines, factor = CASES[name]
    found = support.multiple(factor(rows), our_update(files, rows, lines))
    support.assert_equal(found, trl_update(files, rows, name, **options))
