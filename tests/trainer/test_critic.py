"""Whole runs with a critic: what it learns, exact resumption, and what is refused before it."""

import json
import shutil

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

import RL2.trainer.loop
from RL2.runtime.errors import ConfigError
from RL2.trainer.main import launch
from tests.faults.support import Run, assert_same_run
from tests.trainer.support import composed, overrides, rows_of, write_files

SETTINGS = {
    "adv__estimator": "gae", "adv__lamda": 0.9, "critic__lr": "1e-3", "critic__clip": 1e-4,
    "train_data__prompts_per_rollout": 4, "train_data__responses_per_prompt": 4,
    "actor__update_per_rollout": 2, "actor__kl__coef": 0.1, "actor__kl__type": "reward",
    "actor__freeze_steps": 1, "trainer__max_steps": 4, "trainer__save_freq": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    Run(files, "ppo", folder, **SETTINGS).finish()
    return folder


def test_it_is_trained_before_the_actor_and_beside_it(whole):
    rows = rows_of(whole)
    for row in rows:
        assert row["critic/skipped"] == row["critic/nonfinite"] == 0
        assert row["critic/loss"] > 0 and row["critic/grad_norm"] > 0 and row["critic/lr"] > 0
        assert row["critic/explained_variance"] <= 1
        assert {"timing/compute_old_values", "timing/update_critic"} <= row.keys()
    assert "actor/loss" not in rows[0] and "actor/loss" in rows[1]  # its warm-up
    # It begins with values of 0, and moves within a rollout.
    assert rows[0]["critic/explained_variance"] == 0
    assert any(row["critic/clip_ratio"] > 0 for row in rows)


def test_final_is_the_actor_and_checkpoints_hold_both(whole):
    with safe_open(whole / "final/model.safetensors", "pt") as file:
        assert not any("score" in name for name in file.keys())
    for folder in (whole / "checkpoints").glob("step*"):
        assert [*json.loads((folder / "trainer.json").read_text())["learners"]] == [
            "critic", "actor",
        ]  # fmt: skip


def test_killed_and_resumed_it_is_the_same_run(files, whole, tmp_path):
    folder = tmp_path / "run"
    Run(files, "ppo", folder, **SETTINGS).kill_at(folder / "checkpoints/step000002")
    Run(files, "ppo", folder, **SETTINGS, trainer__load_ckpt_from="latest").finish()
    assert_same_run(folder, whole)


def test_two_processes_go_on_from_the_checkpoint_of_one(files, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").glob("*4"):
        shutil.rmtree(path)
    start = folder / "checkpoints/step000002"
    Run(files, "ppo", folder, 2, **SETTINGS, trainer__load_ckpt_from=start).finish()
    for row, other in zip(rows_of(folder), rows_of(whole), strict=True):
        for name in ("critic/loss", "critic/explained_variance", "actor/loss", "train/score"):
            assert row.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-3, abs=1e-4), name


REWARD_MODEL = {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}


def reward_model(files, folder):
    shutil.copytree(files / "model", folder)
    config = json.loads((folder / "config.json").read_text()) | REWARD_MODEL
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def other_words(files, folder):
    """A model whose tokenizer has the numbers of two tokens swapped."""
    shutil.copytree(files / "model", folder)
    text = (folder / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [*vocabulary][10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def fewer_words(files, folder):
    shutil.copytree(files / "model", folder)
    for path in folder.glob("*token*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shorter(files, folder):
    """A model of fewer positions, beyond which it has none."""
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loss_of_returns(files, folder):
    folder.mkdir()
    (folder / "own.py").write_text("def own(logps, returns):\n    return -logps * returns\n")
    return f"{folder}/own.py:own"


def own_returns(files, folder):
    folder.mkdir()
    (folder / "own.py").write_text(
        "def own(rewards, values):\n    return rewards - values, {'returns': rewards}\n"
    )
    return f"{folder}/own.py:own"


GAE = {"adv__estimator": "gae"}
BAD = {
    "reward model": (
        {"actor__model_name": reward_model},
        "is a Qwen3ForSequenceClassification, su",
    ),
    "reward model as reference": (
        {"ref_actor__model_name": reward_model, "actor__kl__coef": 0.1, "actor__kl__type": "loss"},
        "ref_actor.model_name={path}: is a Qwen3ForSequenceClassification, su",
    ),
    "gamma beside returns": (
        {"adv__import_path": own_returns, "adv__gamma": 0.9},
        "adv.gamma=0.9: has no effect with adv.import_path={path}/own.py:own, which gives the "
        "critic's returns itself; make gamma one of its options",
    ),
    "other tokens": (
        {**GAE, "critic__model_name": other_words},
        "critic.model_name={path}: its tokenizer has {n} tokens, the actor's {n}, and ",
    ),
    "fewer tokens": (
        {**GAE, "critic__model_name": fewer_words},
        "critic.model_name={path}: has 100 tokens (vocab_size in its config.json), the actor's "
        "tokenizer {n}; give",
    ),
    "other tokens of the reference": (
        {"ref_actor__model_name": other_words, "actor__kl__coef": 0.1, "actor__kl__type": "loss"},
        "ref_actor.model_name={path}: its tokenizer has {n} tokens, the actor's {n}, and ",
    ),
    "fewer positions": (
        {**GAE, "critic__model_name": shorter},
        "critic.model_name={path}: is made for 16 tokens, and sequences may have 256; use "
        "actor.max_length_per_device=16 or less, or",
    ),
    "fewer positions of the reference": (
        {"ref_actor__model_name": shorter, "actor__kl__coef": 0.1, "actor__kl__type": "loss"},
        "ref_actor.model_name={path}: is made for 16 tokens, and sequences may have 256; use",
    ),
    "a loss of returns": (
        {"actor__loss__import_path": loss_of_returns},
        "actor.loss: own needs returns, and this run has no critic; set adv.estimator=gae, or use",
    ),
    "without gae": (
        {"critic__lr": 1e-4},
        "critic.lr=0.0001: has no effect with adv.estimator=reinforce, which has no critic; leave",
    ),
    "correct": ({**GAE, "critic__avg_level": "correct"}, "critic.avg_level=correct: a critic lea"),
    "no option": ({**GAE, "adv__norm_var": "true"}, "adv.norm_var=true: has no effect with adv.es"),
    "room": (
        {**GAE, "critic__max_length_per_device": 64},
        "critic.max_length_per_device=64: must be at least actor.max_length_per_device=512, the l",
    ),
    "updates": (
        {**GAE, "critic__update_per_rollout": 3},
        "critic.update_per_rollout=3: must divide the 8 samples of a rollout",
    ),
    "ranks": ({**GAE, "critic__tp_size": 3}, "critic.tp_size=3: must divide world_size=1; use 1"),
    "no model": ({**GAE, "critic__model_name": "none"}, "critic.model_name=none: no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_before_a_model_loads(files, tmp_path, monkeypatch, case):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(RL2.trainer.loop, "load_learners", load)
    changes, expected = BAD[case]
    changes = {
        name: value(files, tmp_path / "other") if callable(value) else value
        for name, value in changes.items()
    }
    with pytest.raises(ConfigError) as error:
        launch(composed("ppo", overrides(files, "ppo", tmp_path / "run", **changes)))
    n = len(AutoTokenizer.from_pretrained(files / "model"))
    assert AutoConfig.from_pretrained(files / "model").vocab_size == n
    line = str(error.value)
    assert expected.format(path=tmp_path / "other", n=n) in line and "\n" not in line
