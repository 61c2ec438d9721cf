"""What models have in common, trained or not."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from transformers import ApertusConfig, AutoModelForCausalLM

from RL2.distributed import rank
from RL2.workers import ShardedModel
from tests.ranks import run_on_ranks
from tests.workers.test_actor import SHAPES, actor_config, make_actor, make_batch, make_model

LORA = {
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "seed": 0}
}  # fmt: skip
SPREADS = [
    (1, {}), (2, {}), (2, {"ddp_size": 2}), (2, {"tp_size": 2}), (2, {"sp_size": 2}), (1, LORA),
    (2, LORA), (2, LORA | {"tp_size": 2}), (1, {"offload_model": True}),
]  # fmt: skip


def read_after_a_forward(model, changes, trained, batch):
    """What those find who use a model after log-probabilities, and no update, were computed."""
    if trained:
        actor = make_actor(model, "ppo", **changes)
    else:
        actor = ShardedModel(actor_config(model, **changes), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in actor.weights()}
    n_bytes = actor.traffic.pop()["comm/weights_bytes"]
    answer = actor.annotate(batch if rank() == 0 else None, {"old_logps": "logps"})
    split = all(isinstance(parameter, DTensor) for parameter in actor.model.parameters())
    actor.traffic.pop()
    after = {name: tensor.clone() for name, tensor in actor.weights()}
    same = before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    same &= actor.traffic.pop()["comm/weights_bytes"] == n_bytes
    if trained:
        # Twice: the first saves what a frozen step leaves, the second what follows an update.
        get_state_dict(actor.model, actor.optimizer)
        actor.update(answer, 1)
        get_state_dict(actor.model, actor.optimizer)
        actor.annotate(batch if rank() == 0 else None, {"old_logps": "logps"})
        dict(actor.weights())
    return split, same


CASES = [(*spread, True) for spread in SPREADS] + [(1, {}, False), (2, {"ddp_size": 2}, False)]


@pytest.mark.parametrize("n_ranks, changes, trained", CASES)
def test_a_forward_without_a_backward_leaves_each_rank_its_part(
    tmp_path, n_ranks, changes, trained
):
    arguments = (make_model(tmp_path), OmegaConf.create(changes), trained, make_batch())
    for split, same in run_on_ranks(n_ranks, read_after_a_forward, *arguments):
        assert split and same


def gradients(model, changes, batch):
    """Of everything, whole, as an update clips it."""
    actor = make_actor(model, "ppo", avg_level="token", max_grad_norm=1e9, **changes)
    found = {}
    clip = actor.clip_gradients

    def keep():
        norm = clip()
        for name, parameter in actor.hf_model.named_parameters():
            found[name] = parameter.grad.full_tensor().clone()
        return norm

    actor.clip_gradients = keep
    actor.update(batch if rank() == 0 else None, 1)
    return found


def test_what_no_plan_names_between_split_layers_gets_its_whole_gradient(tmp_path):
    """Apertus trains two numbers of its activation, of which a rank sees half the input."""
    shape = {
        name: SHAPES["llama"].to_dict()[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "bos_token_id",
                     "eos_token_id", "pad_token_id")
    }  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ApertusConfig(**shape)).save_pretrained(tmp_path)
    batch = make_batch()
    (expected,) = run_on_ranks(1, gradients, str(tmp_path), {}, batch)
    assert any("act_fn.alpha" in name for name in expected)
    for found in run_on_ranks(2, gradients, str(tmp_path), {"tp_size": 2}, batch):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
