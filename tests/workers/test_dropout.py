"""Updates see the policy that sampled: no dropout and no noise but where a config keeps them."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
    SeedOssConfig,
)

from RL2.models.build import check_dropout, load_model
from RL2.runtime.errors import ConfigError
from tests.ranks import run_on_ranks
from tests.workers.test_actor import VOCAB, actor_config, make_actor, make_batch

SIZE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
NOISY = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1,
        embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=1, eos_token_id=1,
    ),
    "seed_oss": SeedOssConfig(**SIZE, head_dim=8, attention_dropout=0.1, residual_dropout=0.1),
    "phimoe": PhimoeConfig(
        **SIZE, num_local_experts=4, router_jitter_noise=0.1, input_jitter_noise=0.1
    ),
}  # fmt: skip


def save(folder, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def two_updates(model, changes):
    """Of one rollout, at a rate that changes nothing; the engine is the policy itself."""
    actor = make_actor(
        model, "ppo", lr=1e-12, weight_decay=0.0, update_per_rollout=2, gradient_checkpointing=True,
        tis_coef=2.0, temperature=1.0, max_inference_length_per_device=200, **changes,
    )  # fmt: skip
    batch = make_batch(n_rows=8)
    actor.annotate(batch, {"old_logps": "logps"})
    batch = actor.annotate(batch, {"old_logps": "logps"})
    batch["llm_logps"] = batch["old_logps"]
    metrics = actor.update(batch, 1)
    own = actor.model(*of_one_pack(batch), 1.0, ("logps",))["logps"]
    return metrics, (own - batch["old_logps"][batch["action_mask"]]).abs().max().item()


def of_one_pack(batch):
    inside = torch.arange(batch["states"].shape[1]) < batch["lengths"][:, None]
    positions = batch["action_mask"][inside].nonzero().squeeze(-1)
    return batch["states"][inside], batch["lengths"], positions, batch["actions"][inside][positions]


@pytest.mark.parametrize("family", NOISY)
def test_an_update_sees_the_policy_that_sampled(tmp_path, family):
    model = save(tmp_path, NOISY[family])
    ((metrics, off),) = run_on_ranks(1, two_updates, model, {"dropout": 0.0})
    assert metrics["actor/clip_ratio"] == 0 and metrics["actor/grad_norm"] > 0
    assert off < 1e-5  # in the mode of updates
    ((metrics, off),) = run_on_ranks(1, two_updates, model, {"dropout": None})
    assert off > 1e-3


def test_ranks_that_share_a_layer_do_not_drop_each_something_else():
    noisy, plain = NOISY["seed_oss"], LlamaConfig(**SIZE)
    for config, changes in (
        (noisy, {"dropout": 0.0, "tp_size": 2}), (noisy, {"dropout": None}),
        (plain, {"dropout": None, "tp_size": 2}),
    ):  # fmt: skip
        check_dropout(config, actor_config("", **changes))
    with pytest.raises(ConfigError, match="^actor.dropout=null: seed_oss has attention_dropout"):
        check_dropout(noisy, actor_config("", dropout=None, tp_size=2))


LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 50,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("rope, at", [(LONG, 50), (DYNAMIC, 64)])
def test_one_long_sequence_must_not_change_the_others(tmp_path, rope, at):
    model = save(tmp_path, LlamaConfig(**SIZE, max_position_embeddings=64, rope_parameters=rope))
    for lengths in ({"max_length_per_device": at + 1}, {"max_inference_length_per_device": at + 1}):
        with pytest.raises(ConfigError, match=f"{at + 1}: llama has rope_type=.*={at} or less"):
            load_model(actor_config(model, **{**fits(at), **lengths}), train=True)
    load_model(actor_config(model, **fits(at)), train=True)


def fits(length):
    return {"max_length_per_device": length, "max_inference_length_per_device": length}


@pytest.mark.parametrize("asks", [True, False])
def test_the_routers_loss_that_is_not_trained_is_said(tmp_path, caplog, asks):
    config = Qwen3MoeConfig(
        **SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        output_router_logits=asks,
    )  # fmt: skip
    model = save(tmp_path, config)
    with caplog.at_level(logging.WARNING):
        load_model(actor_config(model), train=True, node="critic")
    assert ("critic.model_name: qwen3_moe has output_router_logits" in caplog.text) == asks
