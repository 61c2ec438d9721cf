"""Runs with a teacher: without rewards, on rows, and with the policy as its own teacher."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.runtime.errors import ConfigError, DataError
from RL2.trainer.loop import Trainer
from RL2.trainer.main import launch
from tests.trainer.support import composed, overrides, train, write_files, write_model

FREE = {"rollout__env_path": "null", "rollout__dynamic_filtering": "false"}
TOP = {"actor__loss__name": "topk_kl", "teacher__top_k": 5}
REVERSE = {"adv__estimator": "reverse_kl"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("files"))
    write_model(folder / "teacher", std=0.2, width=16)
    rows = [
        {"prompt": f"{i} + 1 = ", "response": "2", "extra_info": {"answer": "4" * (i % 5 + 1)}}
        for i in range(24)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(files, trainer, out, **changes):
    return composed(trainer, overrides(files, trainer, out, **changes))


def refused(files, tmp_path, trainer="ppo", error=ConfigError, **changes):
    with pytest.raises(error) as caught:
        launch(config_of(files, trainer, tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reverse_kl_without_rewards_comes_nearer_to_the_teacher(files, tmp_path):
    """The advantages are the teacher's log-probabilities minus the student's."""
    changes = FREE | REVERSE | {"teacher__model_name": files / "teacher", "actor__lr": 1e-2}
    rows = train(files, "ppo", tmp_path / "out", **changes, trainer__n_epochs=4)
    kl = [row["train/teacher_kl"] for row in rows if "train/teacher_kl" in row]
    assert len(kl) == 12 and kl[-1] < 0.6 * kl[0] and "test/score" not in rows[-1]


def test_top_tokens_of_a_teacher_on_rows(files, tmp_path):
    """The first loss is that of the whole distributions, as all tokens are asked for."""
    changes = TOP | {"teacher__model_name": files / "teacher", "trainer__max_steps": 1}
    changes |= {"data__batch_size": 24, "teacher__top_k": 5000}
    (row,) = train(files, "sft", tmp_path / "out", **changes)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    models = [AutoModelForCausalLM.from_pretrained(files / x) for x in ("model", "teacher")]
    losses = []
    for line in (files / "rows.jsonl").read_text().splitlines():
        one = json.loads(line)
        prompt, response = (
            tokenizer(one[key], add_special_tokens=False)["input_ids"]
            for key in ("prompt", "response")
        )
        ids = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
        with torch.no_grad():
            p, q = (m(ids[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1) for m in models)
        losses.append((q.exp() * (q - p)).sum(-1))
    assert row["actor/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert row["actor/teacher_mass"] == pytest.approx(1.0, abs=1e-5)


def test_a_policy_that_sees_the_answer_teaches_itself(files, tmp_path, monkeypatch):
    """Its log-probabilities are those of the same tokens after the other prompt."""
    changes = FREE | REVERSE | {"train_data__path": files / "answers.jsonl"}
    changes |= {"teacher__model_name": "policy", "teacher__context": '"{prompt}{answer}! "'}
    seen = []
    learn = Trainer._with_advantages

    def spy(self, batch):
        seen.append(batch)
        return learn(self, batch)

    monkeypatch.setattr(Trainer, "_with_advantages", spy)
    train(files, "ppo", tmp_path / "out", **changes, trainer__max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    rows = [json.loads(line) for line in (files / "answers.jsonl").read_text().splitlines()]
    (batch,) = seen
    for row, index in enumerate(batch["prompt_index"].tolist()):
        mask = batch["action_mask"][row]
        response = batch["actions"][row][mask].tolist()
        text = f"{rows[index]['prompt']}{rows[index]['extra_info']['answer']}! "
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(batch["teacher_logps"][row][mask], exact, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batch["teacher_logps"], batch["old_logps"], atol=1e-2)


def test_a_function_makes_the_prompt(files, tmp_path):
    (tmp_path / "mine.py").write_text("def ask(prompt, extra_info):\n    return extra_info\n")
    changes = FREE | REVERSE | {"train_data__path": files / "answers.jsonl"}
    changes |= {"teacher__model_name": "policy"}
    changes["teacher__import_path"] = f"{tmp_path / 'mine.py'}:ask"
    text = refused(files, tmp_path, error=DataError, **changes)
    assert "it returned {'answer': '4'} for a prompt that is a text; return one too" in text


def test_what_is_refused_before_a_model_loads(files, tmp_path, monkeypatch):
    monkeypatch.setattr("RL2.models.loading.materialize", None)
    teacher = {"teacher__model_name": files / "teacher"}
    assert refused(files, tmp_path, **REVERSE).startswith(
        "adv.estimator=reverse_kl: needs teacher_logps of a teacher, and teacher.model_name is null"
    )
    text = refused(files, tmp_path, **teacher)
    assert text.startswith(f"teacher.model_name={files / 'teacher'}: has no effect with actor.loss")
    text = refused(files, tmp_path, "sft", **teacher)
    assert text.startswith(f"teacher.model_name={files / 'teacher'}: has no effect with actor.loss")
    text = refused(files, tmp_path, **teacher, **REVERSE, teacher__top_k=3)
    assert text.startswith("teacher.top_k=3: has no effect without a loss such as topk_kl")
    text = refused(files, tmp_path, **FREE)
    assert text.startswith("rollout.env_path=null: adv.estimator=reinforce reads rewards")


def test_another_vocabulary(files, tmp_path):
    other = write_model(tmp_path / "other")
    own = AutoTokenizer.from_pretrained(other)
    n = len(own)
    own.add_tokens([f"new{i}" for i in range(3)])
    own.save_pretrained(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(n + 3)
    model.save_pretrained(tmp_path / "student")
    changes = FREE | REVERSE | {"teacher__model_name": other}
    text = refused(files, tmp_path, **changes, actor__model_name=tmp_path / "student")
    assert f"teacher.model_name={other}: its tokenizer has {n} tokens, the actor's {n + 3}" in text
