"""A reward model as a judge: its scores are those of transformers, and become rewards."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from RL2.rollout.judges.reward_model import RewardModel
from RL2.runtime.errors import ConfigError
from tests.conftest import make_tiny_tokenizer
from tests.rollout.judges.test_judge import make_group
from tests.trainer.support import train, write_files


def node(folder, **changes):
    base = {
        "model_name": str(folder), "device": "auto", "batch_size": 2, "revision": None,
        "trust_remote_code": False, "allow_pickle": False,
    }  # fmt: skip
    return OmegaConf.create({"reward_model": base | changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    with torch.random.fork_rng(devices=[]):
        for name, labels in (("scores", 1), ("classes", 3)):
            config = AutoConfig.from_pretrained(files / "model", num_labels=labels)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(files / name)
            make_tiny_tokenizer().save_pretrained(files / name)
    return files


def started(files, tokenizer=None, **changes):
    judge = RewardModel(node(files / "scores", **changes))
    judge.start(tokenizer or make_tiny_tokenizer(), torch.device("cpu"))
    return judge


def alone(files, ids):
    model = AutoModelForSequenceClassification.from_pretrained(files / "scores")
    with torch.no_grad():
        return [model(torch.tensor([one])).logits.item() for one in ids]


def test_scores_are_those_of_each_text_alone(files):
    texts = [[5, 9, 30], [7], [8, 2, 100, 41, 12], [3, 3]]
    found = started(files).scores(texts)
    assert found == pytest.approx(alone(files, texts), abs=1e-5) and len({*found}) == 4


def test_a_model_with_the_policys_tokens_reads_them_and_another_reads_text(files):
    group = make_group()
    sample = group.samples[0]
    assert started(files)._tokens(sample) == sample.sequences[0]["token_ids"]
    other = make_tiny_tokenizer()
    other.add_tokens(["more"])
    tokenizer = AutoTokenizer.from_pretrained(files / "scores")
    shown = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nthus\nso 4<|im_end|>\n"
    judge = started(files, other)
    assert tokenizer.decode(judge._tokens(sample)) == shown
    judge.tokenizer.chat_template = None
    assert tokenizer.decode(judge._tokens(sample)) == "qthus\nso 4<|im_end|>"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model", "is a Qwen3ForCausalLM; give a sequence classification model with one label"),
        ("classes", "is a Qwen3ForSequenceClassification with 3 labels; give a sequence class"),
        ("nothing", "cannot be read ("),
    ],
)
def test_a_folder_that_is_no_reward_model(files, name, said):
    with pytest.raises(ConfigError) as error:
        RewardModel(node(files / name))
    assert str(error.value).startswith(f"rollout.reward_model.model_name={files / name}: {said}")
    assert "\n" not in str(error.value)


def test_a_reward_model_without_tokenizer_files(files, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(files / "scores").save_pretrained(tmp_path)
    judge = RewardModel(node(tmp_path))
    with pytest.raises(ConfigError, match="has no tokenizer files, such as tokenizer.json"):
        judge.start(make_tiny_tokenizer(), torch.device("cpu"))


def test_rewards_of_a_run_are_its_scores(files, tmp_path):
    (row,) = train(
        files, "ppo", tmp_path, rollout__judges="[reward_model]", trainer__max_steps=1,
        rollout__reward_model__model_name=files / "scores",
    )  # fmt: skip
    lines = (tmp_path / "rollouts/step000001_train.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    rewards = [sample["reward"] for sample in samples]
    assert row["train/reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    assert {sample["score"] for sample in samples} <= {0.0, 1.0}  # the environment's
    assert not {*rewards} <= {0.0, 1.0} and len({*rewards}) > 1
