"""LoRA: adapters alone are trained, by the same gradient however it is spread, and what leaves the
trainer is a plain model."""

import json
import logging
import math

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from RL2.distributed import rank
from RL2.models.heads import TokenStatsHead
from RL2.models.loading import local_part, plain_name
from RL2.models.lora import add_adapters, init_adapters, merged
from RL2.runtime.errors import ConfigError
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.export import save_model
from tests.ranks import run_on_ranks
from tests.trainer.support import NoData
from tests.workers.test_actor import (
    SHAPES,
    as_spo,
    make_actor,
    make_batch,
    make_model,
    naive_spo,
    whole,
)

LORA = {"rank": 3, "alpha": 6, "dropout": 0.0, "target_modules": "all-linear", "seed": 5}
N_ADAPTED = {"qwen3": 14, "llama": 14, "gpt2": 8}  # linear layers but the head


def is_adapter(name):
    return plain_name(name) is None


def lora_actor(model, loss="spo", lora=None, **changes):
    """An actor whose B are not zero, as after some training: with zeros A has no gradient."""
    actor = make_actor(model, loss, lora=LORA | (lora or {}), **changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in actor.hf_model.named_parameters():
        if ".lora_B." in name:
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.to_local().copy_(values[local_part(parameter)])
    return actor


def peft_model(model, weights, lora=None):
    """peft's own model around the plain one, with these adapters."""
    lora = LORA | (lora or {})
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"],
        fan_in_fan_out=plain.config.model_type == "gpt2",
    )  # fmt: skip
    wrapped = get_peft_model(plain, config)
    parameters = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if is_adapter(name):
                parameters[f"base_model.model.{name}"].copy_(tensor)
    return wrapped


def logits_on_each_row(model, batch):
    for row, length in enumerate(batch["lengths"].tolist()):
        yield model(batch["states"][row : row + 1, :length]).logits[0], row


# ------------------------------------------------------------------------------ the update


def two_updates(model, changes, batch, lora=None):
    """Metrics of two updates, the first one's gradients, and the weights before and after."""
    actor = lora_actor(model, lora=lora, **changes)
    before, gradients = whole(actor), {}

    def keep(*_):
        for name, parameter in actor.hf_model.named_parameters():
            if parameter.grad is not None and name not in gradients:
                gradients[name] = parameter.grad.full_tensor().clone()

    actor.optimizer.register_step_pre_hook(keep)
    metrics = [actor.update(batch if rank() == 0 else None, step) for step in (1, 2)]
    n_trained = len(actor.optimizer.state)
    return metrics, gradients, before, whole(actor), n_trained


@pytest.mark.parametrize("shape", SHAPES)
def test_only_adapters_move_and_by_the_gradient_of_each_row_alone(tmp_path, shape):
    model, batch = make_model(tmp_path, shape), as_spo(make_batch())
    ((metrics, gradients, before, after, n_trained),) = run_on_ranks(
        1, two_updates, model, {"max_grad_norm": 1e9}, batch
    )
    adapters = {name for name in before if is_adapter(name)}
    assert len(adapters) == n_trained == 2 * N_ADAPTED[shape]
    assert adapters == gradients.keys()
    assert adapters == {name for name in before if not torch.equal(before[name], after[name])}

    reference, total = peft_model(model, before), 0.0
    for logits, row in logits_on_each_row(reference, batch):
        if batch["correct"][row]:
            mask = batch["action_mask"][row, : len(logits)]
            actions = batch["actions"][row, : len(logits)][mask]
            losses = naive_spo(logits[mask].double() / 0.9, actions)
            total = total + losses.mean() / len(batch["lengths"])
    total.backward()
    assert metrics[0]["actor/loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            gradient = gradients[name.removeprefix("base_model.model.")]
            error = (gradient - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, name


SPREADS = [
    (1, {"max_length_per_device": 24}),
    (1, {"gradient_checkpointing": True, "offload_activations": True}),
    (2, {}),
    (4, {}),  # more ranks than rows of A
    (4, {"ddp_size": 2}),
    (2, {"tp_size": 2}),
    (4, {"tp_size": 2, "gradient_checkpointing": True}),
    (2, {"sp_size": 2}),
]


@pytest.mark.parametrize(("n_ranks", "changes"), SPREADS)
def test_update_is_the_same_however_it_is_spread(tmp_path, n_ranks, changes):
    """Gradients within 1e-5 of their norm, metrics within 1e-5; first adapters bit for bit."""
    model, batch = make_model(tmp_path), as_spo(make_batch())
    ((metrics, gradients, before, after, _),) = run_on_ranks(1, two_updates, model, {}, batch)
    for result in run_on_ranks(n_ranks, two_updates, model, changes, batch):
        for one, expected in zip(result[0], metrics, strict=True):
            assert one == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert result[1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (result[1][name] - gradient).norm() < 1e-5 * gradient.norm(), name
        for name in before:
            assert torch.equal(result[2][name], before[name]), name
            # AdamW divides by the gradient's size, so tiny gradients amplify rounding
            torch.testing.assert_close(result[3][name], after[name], rtol=0, atol=2e-5)


def test_dropout_is_for_training_alone(tmp_path):
    model, batch = make_model(tmp_path), as_spo(make_batch())
    (exact,) = run_on_ranks(1, loss_and_logps, model, batch, 0.0)
    (dropped,) = run_on_ranks(1, loss_and_logps, model, batch, 0.5)
    assert torch.equal(dropped[1], exact[1])
    assert abs(dropped[0] - exact[0]) > 1e-3 * exact[0]


def loss_and_logps(model, batch, dropout):
    actor = lora_actor(model, lora={"dropout": dropout})
    logps = actor.annotate(batch, {"logps": "logps"})["logps"]
    return actor.update(batch, 1)["actor/loss"], logps


# ------------------------------------------------------------------------------ first weights


def first_weights(model, lora):
    actor = make_actor(model, lora=LORA | lora)
    return whole(actor)


def test_first_weights_are_those_of_a_linear_layer_and_change_nothing(tmp_path):
    model = make_model(tmp_path)
    (one,) = run_on_ranks(1, first_weights, model, {"rank": 16})
    (other,) = run_on_ranks(1, first_weights, model, {"rank": 16, "seed": 6})
    plain = AutoModelForCausalLM.from_pretrained(model).state_dict()
    drawn = [name for name in one if ".lora_A." in name]
    for name in drawn:
        bound = 1 / math.sqrt(one[name].shape[1])  # uniform, as nn.Linear's weight
        assert 0.9 * bound < one[name].abs().max() <= bound
        assert one[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not torch.equal(one[name], other[name])
    assert len({one[name].flatten()[0].item() for name in drawn}) == len(drawn)
    for name, tensor in one.items():
        if ".lora_B." in name:
            assert not tensor.any()
        elif not is_adapter(name):
            assert torch.equal(tensor, plain[plain_name(name)])


def test_first_weights_do_not_depend_on_how_the_model_is_read(tmp_path, monkeypatch):
    """From files onto a sharded model, or whole by transformers where those do not fit."""
    model = make_model(tmp_path)
    (lean,) = run_on_ranks(1, first_weights, model, {})
    monkeypatch.setattr("RL2.models.build.holds_all", lambda *_: False)
    (whole_model,) = run_on_ranks(1, first_weights, model, {})
    assert lean.keys() == whole_model.keys()
    assert all(torch.equal(lean[name], whole_model[name]) for name in lean)


def test_first_weights_do_not_touch_the_random_generator(tmp_path):
    wrapped = peft_model(make_model(tmp_path), {})
    state = torch.get_rng_state()
    init_adapters(wrapped.base_model.model, 0)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------ what leaves


def leave(model, changes, folder, tokenizer):
    """Weights with adapters, what engines get, and whether that left the former alone."""
    actor = lora_actor(model, **changes)
    before = whole(actor)
    published = {name: tensor.clone() for name, tensor in actor.weights()}
    save_model(actor, tokenizer, folder, "auto")
    after = whole(actor)
    return before, published, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("shape", "n_ranks", "changes"),
    [("qwen3", 1, {}), ("llama", 2, {}), ("gpt2", 2, {}), ("llama", 4, {"tp_size": 2})],
)
def test_engines_and_saved_models_compute_what_the_adapters_do(
    tmp_path, tiny_tokenizer, shape, n_ranks, changes
):
    model, batch = make_model(tmp_path / "model", shape), make_batch()
    folder = tmp_path / "final"
    results = run_on_ranks(n_ranks, leave, model, changes, folder, tiny_tokenizer)
    assert all(same for _, _, same in results)
    before, published, _ = results[0]
    base = AutoModelForCausalLM.from_pretrained(model)
    merged_model = AutoModelForCausalLM.from_pretrained(model)
    assert published.keys() == dict(base.named_parameters()).keys()
    merged_model.load_state_dict(published, strict=False)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    assert not (folder / "adapter_config.json").exists()  # transformers would add it once more
    targets = json.loads((folder / "adapter/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # the same bytes in every process
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, published[name])

    expected = peft_model(model, before)
    with torch.no_grad():
        for logits, row in logits_on_each_row(expected, batch):
            states = batch["states"][row : row + 1, : len(logits)]
            for other in (merged_model, saved, adapted):
                # of logits around 0.5
                torch.testing.assert_close(other(states).logits[0], logits, rtol=0, atol=1e-5)
            with expected.disable_adapter():
                assert (expected(states).logits[0] - logits).abs().max() > 1e-2


def test_merging_holds_one_layer_and_leaves_other_tensors_alone(tmp_path):
    wrapped = peft_model(make_model(tmp_path), {}).base_model.model
    tensors = dict(wrapped.named_parameters())
    handed, order = [], []  # since the last one came out; all that came out

    def hand_out():
        for name, tensor in tensors.items():
            handed.append(name)
            yield name, tensor

    for name, tensor in merged(wrapped, hand_out()):
        order.append(name)
        assert len(handed) <= 3
        handed.clear()
        if name in tensors:
            assert tensor is tensors[name]
    assert order == [plain_name(name) for name in tensors if not is_adapter(name)]


def save_checkpoint(model, batch, folder):
    actor = lora_actor(model)
    actor.update(batch if rank() == 0 else None, 1)
    Checkpoints(folder).save(1, {"actor": actor}, {}, {})
    return whole(actor), actor.update(batch if rank() == 0 else None, 2)


def load_checkpoint(model, batch, folder):
    actor = make_actor(model, "spo", lora=LORA)
    Checkpoints(folder).load("latest", {"actor": actor}, NoData())
    return whole(actor), actor.update(batch if rank() == 0 else None, 2)


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_a_checkpoint_of_two_ranks_continues_on_any_number(tmp_path, n_ranks):
    model, batch = make_model(tmp_path / "model"), as_spo(make_batch())
    weights, metrics = run_on_ranks(2, save_checkpoint, model, batch, tmp_path)[0]
    for loaded, continued in run_on_ranks(n_ranks, load_checkpoint, model, batch, tmp_path):
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
        assert continued == pytest.approx(metrics, rel=1e-5, abs=1e-7)


# ------------------------------------------------------------------------------ which layers


def adapted_layers(model, targets):
    try:
        actor = make_actor(model, lora=LORA | {"target_modules": targets})
    except ConfigError as error:
        return str(error)
    return {name.partition(".lora_")[0] for name in whole(actor) if is_adapter(name)}


def test_targets_by_name(tmp_path):
    model = make_model(tmp_path)
    (layers,) = run_on_ranks(1, adapted_layers, model, "q_proj")
    assert layers == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    (layers,) = run_on_ranks(1, adapted_layers, model, ["v_proj", "layers.1.mlp.down_proj"])
    assert sorted(layers) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm", "proj", "c_attn"])
def test_a_target_that_is_no_linear_layer_is_named_with_those_that_are(tmp_path, name):
    model = make_model(tmp_path, "llama")
    (message,) = run_on_ranks(1, adapted_layers, model, ["q_proj", name])
    assert message == (
        f"actor.lora.target_modules={name}: no linear layer of {model} has that name, except "
        "the head; use all-linear, or some of down_proj, gate_proj, k_proj, o_proj, q_proj, "
        "up_proj, v_proj"
    )


def test_experts_are_no_linear_layers(tmp_path):
    """transformers keeps them as one tensor, and peft would merge them by other rules."""
    shape = SHAPES["llama"].to_dict() | {"model_type": "qwen3_moe"}
    config = Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (layers,) = run_on_ranks(1, adapted_layers, str(tmp_path), "all-linear")
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_layers_beside_fused_experts_get_adapters_and_the_experts_none(caplog):
    """peft itself would take the shared experts' names for those of the fused ones."""
    caplog.set_level(logging.INFO, logger="RL2")
    shape = SHAPES["llama"].to_dict() | {"model_type": "deepseek_v3", "num_key_value_heads": 4}
    config = DeepseekV3Config(
        **shape, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        plain = {name for name, _ in model.named_parameters()}
    config = OmegaConf.create(LORA | {"target_modules": "all-linear"})
    add_adapters(model, config, TokenStatsHead, "critic")
    found = {plain_name(name) for name, _ in model.named_parameters()}
    assert found - {None} == plain
    names = [name for name, _ in model.named_parameters() if is_adapter(name)]
    adapted = {name.partition(".lora_")[0] for name in names}
    assert {"model.layers.1.mlp.shared_experts.up_proj", "model.layers.0.mlp.up_proj"} <= adapted
    assert not any(name.endswith("mlp.experts") or ".experts." in name for name in adapted)
    (line,) = [text for text in caplog.messages if "no adapters for" in text]
    assert line.startswith("critic.lora.") and "model.layers.*.mlp.experts" in line


def test_a_reference_has_no_adapters(tmp_path):
    ((n_adapters, is_sharded),) = run_on_ranks(1, reference, make_model(tmp_path))
    assert n_adapters == 0 and is_sharded


def reference(model):
    from RL2.workers import ShardedModel
    from tests.workers.test_actor import actor_config

    config = actor_config(model)
    del config["lora"]
    parameters = dict(ShardedModel(config, torch.device("cpu")).hf_model.named_parameters())
    sharded = all(isinstance(parameter, DTensor) for parameter in parameters.values())
    return sum(map(is_adapter, parameters)), sharded
