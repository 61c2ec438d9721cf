"""The scalar head, against transformers' layer on hidden states of one row at a time. That of token
statistics is held by tests/invariance and tests/ops/token_stats."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from RL2.algorithms.losses.values import value
from RL2.algorithms.token_loss import TokenLoss
from RL2.distributed import rank
from RL2.models.heads import HEADS, Question
from RL2.runtime.errors import ConfigError
from RL2.trainer.checkpoints.export import save_model
from RL2.workers import Learner, ShardedModel
from tests.docs import example_module
from tests.ranks import run_on_ranks
from tests.workers.test_actor import actor_config, make_batch, make_model, whole

CPU = torch.device("cpu")


REGRESSION = TokenLoss(
    "regression", example_module("regression.py").regression, ("values", "rewards")
)


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def make_critic(model, **changes):
    critic = Learner(actor_config(model, **changes), CPU, "critic", REGRESSION)
    critic.prepare_scheduler(4)
    return critic


def with_score(model, score=None):
    """Put a layer `score` that is not zero into the model's files."""
    path = f"{model}/model.safetensors"
    if score is None:
        score = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)) / 4
    save_file(load_file(path) | {"score.weight": score}, path, metadata={"format": "pt"})
    return score


def data():
    """Eight rows that make four pairs, and what a critic learns from."""
    batch = make_batch(8)
    generator = torch.Generator().manual_seed(1)
    fields = {
        name: torch.randn(batch["states"].shape, generator=generator) * batch["action_mask"]
        for name in ("rewards", "returns", "old_values")
    }
    rows = torch.arange(8)
    return batch | fields | {"pair_ids": rows // 2, "chosen": rows % 2 == 0}


def pairwise(values, sequences, pairs):
    margin = pairs.difference(sequences.mean(values))
    return -torch.nn.functional.logsigmoid(margin), {"margin": margin}


LOSSES = {
    "regression": REGRESSION,
    "value": TokenLoss("value", partial(value, clip=0.1), ("values", "old_values", "returns")),
    "pairs": TokenLoss("pairwise", pairwise, ("values", "sequences", "pairs"), kind="pairs"),
}


def values_of(reference, batch):
    """Values `[B, T]` by transformers, one row at a time."""
    rows = []
    for row, length in enumerate(batch["lengths"]):
        hidden = reference.base_model(batch["states"][row, None, :length]).last_hidden_state[0]
        values = hidden @ reference.score.weight[0]
        rows.append(torch.nn.functional.pad(values, (0, batch["states"].shape[1] - int(length))))
    return torch.stack(rows) * batch["action_mask"]


def naive(model, batch, loss="regression"):
    """Values, loss and gradients, by transformers and autograd."""
    reference = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    values, mask = values_of(reference, batch), batch["action_mask"]
    if loss == "pairs":  # a pair weighs as much as its tokens
        means = values.sum(-1) / mask.sum(-1)
        margins, n = means[0::2] - means[1::2], mask.sum(-1)
        weights = (n[0::2] + n[1::2]) / n.sum()
        total = -(weights * torch.nn.functional.logsigmoid(margins)).sum()
    elif loss == "value":
        near = batch["old_values"] + (values - batch["old_values"]).clamp(-0.1, 0.1)
        errors = [(x - batch["returns"]).square() for x in (values, near)]
        total = torch.maximum(*errors)[mask].mean()
    else:
        total = (values - batch["rewards"]).square()[mask].mean()
    total.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    return values.detach(), total.item(), gradients


def learn(model, batch, changes, folder, loss="regression"):
    config = actor_config(model, avg_level="token", max_grad_norm=1e9, **changes)
    critic = Learner(config, CPU, "critic", LOSSES[loss])
    critic.prepare_scheduler(4)
    mine = batch if rank() == 0 else None
    values = critic.annotate(mine, {"old_values": "values"})
    found, clip = {}, critic.clip_gradients

    def keep():
        norm = clip()
        for name, parameter in critic.hf_model.named_parameters():
            found[name] = parameter.grad.full_tensor().clone()
        return norm

    critic.clip_gradients = keep
    metrics = critic.update(mine, 1)
    if folder is not None:
        save_model(critic, NoTokenizer(), folder, "auto")
    return values and values["old_values"], metrics, found, whole(critic)


SPREADS = {
    "gpt2": (1, {}),
    "small packs": (1, {"max_length_per_device": 24, "gradient_checkpointing": True}),
    "fsdp2": (2, {}),
    "ddp2": (2, {"ddp_size": 2}),
    "tp2": (2, {"tp_size": 2}),
    "sp2": (2, {"sp_size": 2}),
}


# The formula of each loss, under some spreads; that of the critic under all.
CASES = [("value", spread) for spread in SPREADS] + [
    ("regression", "gpt2"), ("pairs", "small packs"), ("pairs", "fsdp2"), ("pairs", "sp2"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "spread"), CASES)
def test_values_loss_and_gradients_are_those_of_the_formula(tmp_path, loss, spread):
    n_ranks, changes = SPREADS[spread]
    shape = "gpt2" if spread == "gpt2" else "qwen3"
    model, batch = make_model(tmp_path / "model", shape), data()
    if loss == "pairs":
        changes = changes | {"max_length_per_device": 48}
    with_score(model)
    values, expected, gradients = naive(model, batch, loss)
    results = run_on_ranks(n_ranks, learn, model, batch, changes, None, loss)
    for own, metrics, found, _ in results:
        if own is not None:
            torch.testing.assert_close(own, values, rtol=1e-4, atol=1e-5)
        assert metrics["critic/loss"] == pytest.approx(expected, rel=1e-5)
        if loss == "regression":
            n = batch["action_mask"].sum().item()
            assert metrics["critic/value"] == pytest.approx(values.sum().item() / n, rel=1e-4)
        assert found.keys() == gradients.keys() and "score.weight" in found
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5, msg=name)


def test_it_begins_at_zero_and_is_saved_with_the_model(tmp_path):
    """The checkpoint of a causal LM has no such layer; transformers loads the saved one."""
    model = make_model(tmp_path / "model")
    ((values, metrics, _, weights),) = run_on_ranks(
        1, learn, model, data(), {"lr": 1e-2}, tmp_path / "final"
    )
    assert not values.any() and metrics["critic/value"] == 0
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert saved.config.num_labels == 1 and saved.score.weight.any()
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    ((values, *_),) = run_on_ranks(1, learn, str(tmp_path / "final"), data(), {}, None)
    assert values.any()


def loaded_whole(model):
    return whole(ShardedModel(actor_config(model), CPU, head="scalar"))


def test_it_begins_at_zero_where_transformers_loads_the_model(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    monkeypatch.setattr("RL2.models.build.holds_all", lambda *_: False)
    (weights,) = run_on_ranks(1, loaded_whole, model)
    assert not weights["score.weight"].any() and weights["model.norm.weight"].any()


def adapted(model, batch):
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "seed": 0}
    critic = make_critic(model, lora=lora)
    critic.update(batch, 1)
    parameters = critic.hf_model.named_parameters()
    return [name for name, p in parameters if p.requires_grad], whole(critic)


def test_beside_adapters_it_is_trained_whole(tmp_path):
    ((trained, weights),) = run_on_ranks(1, adapted, make_model(tmp_path), data())
    assert "score.weight" in trained and all(".lora_" in n or "score" in n for n in trained)
    assert not any("score.lora" in name for name in weights) and weights["score.weight"].any()


def half_precision(model, batch):
    frozen = ShardedModel(actor_config(model, dtype="bfloat16"), CPU, head="scalar")
    return frozen.annotate(batch, {"v": "values"})["v"], frozen.hf_model.score.weight.full_tensor()


def test_the_layer_is_computed_in_fp32(tmp_path):
    """Next to no value is one that bfloat16 has."""
    model, batch = make_model(tmp_path), data()
    score = with_score(model)
    ((values, weight),) = run_on_ranks(1, half_precision, model, batch)
    assert torch.equal(weight, score)
    mask = batch["action_mask"]
    assert (values.bfloat16().float() != values)[mask].float().mean() > 0.9
    assert torch.allclose(values, naive(model, batch)[0], atol=0.1)


def test_what_it_cannot_give_is_no_silence():
    question = Question(None, None, None, None, 1.0, ("values", "logps"))
    with pytest.raises(ValueError, match="gives values, not values, logps"):
        HEADS["scalar"].__call__(None, question)


def test_a_family_without_the_layer_is_refused(tmp_path):
    """transformers has no such class for it, or one whose layer has another name."""
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    node = OmegaConf.create({"model_name": "some/bert"})
    with pytest.raises(ConfigError, match="^actor.model_name=some/bert: models of type bert have"):
        HEADS["scalar"](BertForSequenceClassification(config), node)
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1, "bos_token_id": None,
             "eos_token_id": None, "pad_token_id": None}  # fmt: skip
    AutoModelForCausalLM.from_config(ApertusConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="be loaded as a model with one number for each token"):
        ShardedModel(actor_config(str(tmp_path)), CPU, head="scalar")


def test_labels_of_another_number_are_refused(tmp_path):
    model = make_model(tmp_path)
    with_score(model, torch.ones(2, 32))
    message = r"score.weight has the shape \[2, 32\], the model expects"
    with pytest.raises(ConfigError, match=message):
        ShardedModel(actor_config(model), CPU, head="scalar")


def heads_of(model, batch):
    HEADS["chance"] = example_module("chance.py").ChanceHead
    try:
        models = [
            ShardedModel(actor_config(model), CPU, head=name) for name in ("scalar", "chance")
        ]
        return [
            one.annotate(batch, {"found": name})["found"]
            for one, name in zip(models, ("values", "chances"), strict=True)
        ]
    finally:
        del HEADS["chance"]


def test_a_head_is_a_class_and_a_line(tmp_path):
    model, batch = make_model(tmp_path / "model"), make_batch()
    with_score(model)
    ((values, chances),) = run_on_ranks(1, heads_of, model, batch)
    mask = batch["action_mask"]
    torch.testing.assert_close(chances[mask], values[mask].sigmoid())
