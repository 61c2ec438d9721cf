"""The update: what enters it, and when it is skipped. That it is the same however it is spread is
held by `tests/invariance`."""

import re
import shutil
from copy import deepcopy

import pytest
import torch
from omegaconf import OmegaConf
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig, LlamaConfig, Qwen3Config

from RL2.algorithms import resolve_loss
from RL2.distributed import process_group, rank
from RL2.runtime.errors import ConfigError, TrainingError
from RL2.workers import Actor
from RL2.workers.metrics import not_finite
from tests.ranks import run_on_ranks

VOCAB = 67
SHAPES = {
    "qwen3": Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    ),
}  # fmt: skip
LOSSES = {
    "ppo": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2},
    "spo": {"name": "max_target_kl"},
    "spo_0p5": {"name": "fixed_target_kl"},
    "rank_jsd": {"name": "rank_jsd", "max_rank": 3},
    "gspo": {"name": "gspo"},
    "dpo": {"name": "dpo"},
}
LEVELS = ("token", "sequence", "correct")


def make_model(folder, shape="qwen3"):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(deepcopy(SHAPES[shape])).save_pretrained(folder)
    return str(folder)


def actor_config(model, **changes):
    config = {
        "model_name": model, "trust_remote_code": False, "revision": None, "allow_pickle": False,
        "attn_implementation": "sdpa_varlen",
        "dtype": "auto", "dropout": 0.0, "use_liger_kernel": False, "gradient_checkpointing": False,
        "ddp_size": 1, "tp_size": 1, "sp_size": 1, "compile": False, "offload_activations": False,
        "offload_model": False, "offload_optimizer": False, "lr": 1e-3, "weight_decay": 0.01,
        "max_grad_norm": 1.0, "scheduler": "constant", "warmup_ratio": 0.0, "freeze_steps": 0,
        "betas": [0.9, 0.999], "decay_ratio": None, "min_lr_ratio": 0.0,
        "temperature": 0.9, "max_length_per_device": 64, "max_inference_length_per_device": 64,
        "update_per_rollout": 1, "avg_level": "sequence", "tis_coef": 0.0, "tis_type": "truncate",
        "token_stats": "auto",
        "entropy": {"coef": 0.0}, "lora": {"rank": None},
        "kl": {"coef": 0.0, "type": None, "loss_estimator": "k3"},
    }  # fmt: skip
    return OmegaConf.merge(config, changes)


def make_batch(n_rows=7, correct=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 24, (n_rows,), generator=generator)
    n_tokens = int(lengths.max())
    position = torch.arange(n_tokens)
    mask = (position >= 4) & (position < lengths[:, None])
    shape = (n_rows, n_tokens)
    if correct is None:
        correct = torch.arange(n_rows) % 2 == 0
    correct = torch.as_tensor(correct)
    states = torch.randint(2, VOCAB, shape, generator=generator)
    return {
        "states": states,
        "actions": states.roll(-1, 1) * mask,
        "action_mask": mask,
        "lengths": lengths,
        "rewards": torch.zeros(shape),
        "llm_logps": torch.full(shape, -4.0) * mask,
        "old_logps": torch.full(shape, -4.2) * mask,
        "advantages": torch.where(correct, 1.0, -0.5)[:, None] * mask,
        "sample_ids": torch.arange(n_rows),
        "group_ids": torch.arange(n_rows),
        "correct": correct,
    }


def as_spo(batch):
    """The advantage of `adv.estimator=spo`: the reward itself."""
    return batch | {"advantages": batch["action_mask"] * batch["correct"][:, None].float()}


def make_actor(model, loss="spo", max_bad_steps=2, device="cpu", **changes):
    actor = Actor(
        actor_config(model, **changes),
        torch.device(device),
        resolve_loss(LOSSES[loss]),
        max_bad_steps,
    )
    actor.prepare_scheduler(10)
    return actor


def whole(actor):
    return {name: p.detach().full_tensor().clone() for name, p in actor.hf_model.named_parameters()}


def one_update(model, loss, changes, batch):
    actor = make_actor(model, loss, **changes)
    metrics = actor.update(batch if rank() == 0 else None, 1)
    return metrics, whole(actor)


def many_updates(model, cases):
    return [one_update(model, *case) for case in cases]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_implementation_of_the_head_makes_the_same_update(tmp_path, shape):
    model = make_model(tmp_path, shape)
    cases = [
        (loss, {"token_stats": how, "entropy": {"coef": coef}}, as_spo(make_batch()))
        for loss, coef in (("ppo", 0.0), ("spo", 0.0), ("spo", -0.5), ("rank_jsd", 0.1))
        for how in ("naive", "tiled")
    ]
    (results,) = run_on_ranks(1, many_updates, model, cases)
    for (naive, naive_weights), (tiled, tiled_weights) in zip(
        results[::2], results[1::2], strict=True
    ):
        assert naive.keys() == tiled.keys() and naive["actor/grad_norm"] > 0
        for name, value in naive.items():
            assert tiled[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        for name, weight in naive_weights.items():
            # a step of AdamW is 1e-3, also where the gradient is next to nothing
            torch.testing.assert_close(tiled_weights[name], weight, rtol=0, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_make_the_same_update(tmp_path):
    """Two updates of other lengths, so that a layer compiled for one pack meets another."""
    model = make_model(tmp_path)
    batches = [as_spo(make_batch(seed=seed)) for seed in (0, 1)]
    eager, compiled = (
        run_on_ranks(2, updates_in_turn, model, {"compile": how}, batches)[0]
        for how in (False, True)
    )
    assert not eager[2] and compiled[2] > 0
    for metrics, other in zip(eager[0], compiled[0], strict=True):
        assert metrics.keys() == other.keys()
        for name, value in metrics.items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for name, weight in eager[1].items():
        torch.testing.assert_close(compiled[1][name], weight, rtol=0, atol=1e-4)


def updates_in_turn(model, changes, batches):
    """Metrics of the updates, the weights afterwards, and how many graphs were compiled."""
    torch.compiler.reset()
    counters.clear()
    actor = make_actor(model, gradient_checkpointing=True, **changes)
    metrics = [actor.update(batch if rank() == 0 else None, 1) for batch in batches]
    return metrics, whole(actor), counters["stats"]["unique_graphs"]


def put_away_between_updates(model, changes, batches, device="cpu"):
    actor = make_actor(model, device=device, **changes)
    metrics, held = [], []
    for batch in batches:
        actor.offload()
        held.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
        if (
            batch := actor.annotate(batch if rank() == 0 else None, {"old_logps": "logps"})
        ) is not None:
            batch = batch | {"llm_logps": batch["old_logps"]}
        metrics.append(actor.update(batch, 1))
    return metrics, whole(actor), held


OFFLOAD = {"offload_model": True, "offload_optimizer": True, "offload_activations": True}


@pytest.mark.parametrize("n_ranks, changes", [(1, {}), (2, {}), (2, {"tp_size": 2})])
def test_offloading_changes_no_number(tmp_path, n_ranks, changes):
    """On a CPU everything stays where it is; what is tested is that moving it breaks nothing."""
    model = make_model(tmp_path)
    batches = [make_batch(seed=seed) for seed in (0, 1)]
    plain, away = (
        run_on_ranks(n_ranks, put_away_between_updates, model, changes | more, batches)[0]
        for more in ({}, OFFLOAD)
    )
    assert away[0] == plain[0]
    for name, weight in plain[1].items():
        assert torch.equal(away[1][name], weight), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_frees_the_gpu(tmp_path):
    model, batches = make_model(tmp_path), [make_batch(seed=seed) for seed in (0, 1)]
    with process_group("cuda"):
        plain = put_away_between_updates(model, {}, batches, "cuda")
        away = put_away_between_updates(model, OFFLOAD, batches, "cuda")
    assert away[0] == plain[0]
    assert max(away[2]) < min(plain[2]) / 10


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return result


def largest_tensor_of_an_update(model, batch, implementation, loss):
    actor = make_actor(
        model, loss, token_stats=implementation, max_length_per_device=4096,
        max_inference_length_per_device=4096,
    )  # fmt: skip
    n_actions = int(batch["action_mask"].sum())
    with LargestTensor() as largest:
        batch = actor.annotate(batch, {"old_logps": "logps"})
        metrics = actor.update(batch, 1)
    assert metrics["actor/grad_norm"] > 0
    return largest.numel, n_actions


@pytest.mark.parametrize("tied", [True, False])
def test_an_update_never_holds_the_logits(tmp_path, tied):
    n_columns = 40_000
    torch.manual_seed(0)
    config = Qwen3Config(**(SHAPES["qwen3"].to_dict() | {"vocab_size": n_columns}))
    config.tie_word_embeddings, config.hidden_size = tied, 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    batch = as_spo(make_batch(n_rows=64))
    for implementation, loss, holds in (
        ("naive", "spo", True), ("tiled", "spo", False), ("tiled", "gspo", False),
    ):  # fmt: skip
        arguments = (largest_tensor_of_an_update, str(tmp_path), batch, implementation, loss)
        ((numel, n_actions),) = run_on_ranks(1, *arguments)
        assert n_actions * 8 > 64 * 64  # enough tokens for the bound to mean something
        assert (numel >= n_actions * n_columns) == holds
        if not holds:  # the weights are the largest tensor around, or a tile
            assert numel <= max(n_columns * 8, 512 * 4096)


def naive_spo(logits, actions, detach=False):
    p = logits.softmax(-1)
    chosen, top = p.gather(1, actions[:, None])[:, 0], p.max(-1).values
    return top * (top / chosen).log() + (1 - top) * ((1 - top) / (1 - chosen)).log()


def compute_logps(model, batch, n_times):
    actor = make_actor(model)
    for _ in range(n_times):
        batch = actor.annotate(batch if rank() == 0 else None, {"old_logps": "logps"})
    return batch and batch["old_logps"]


def skip_and_step(model, batch, level):
    actor = make_actor(model, avg_level=level, entropy={"coef": -1.0})
    before = whole(actor)
    metrics = [actor.update(b if rank() == 0 else None, 1) for b in (None, batch)]
    same = all(torch.equal(before[name], after) for name, after in whole(actor).items())
    return metrics, same, len(actor.optimizer.state), actor.scheduler.last_epoch


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_correct_changes_nothing_and_says_so(tmp_path, level):
    batch = as_spo(make_batch(correct=[False] * 7))
    for metrics, same, n_moments, epoch in run_on_ranks(
        2, skip_and_step, make_model(tmp_path), batch, level
    ):
        assert [m["actor/skipped"] for m in metrics] == [1.0, 1.0]
        assert same and n_moments == 0 and epoch == 0


def plant_nan(model, batch):
    actor = make_actor(model, loss="ppo", max_bad_steps=2)
    poisoned = batch | {"advantages": batch["advantages"] * float("nan")}
    before = whole(actor)
    first = actor.update(poisoned if rank() == 0 else None, 1)
    same = all(torch.equal(before[name], after) for name, after in whole(actor).items())
    actor.update(batch if rank() == 0 else None, 2)  # a good one resets the count
    actor.update(poisoned if rank() == 0 else None, 3)
    try:
        actor.update(poisoned if rank() == 0 else None, 4)
    except TrainingError as error:
        return first, same, str(error)
    return first, same, None


def test_non_finite_updates_are_skipped_counted_and_stop_the_run(tmp_path):
    for first, same, message in run_on_ranks(2, plant_nan, make_model(tmp_path), make_batch()):
        assert first["actor/nonfinite"] == 1.0
        assert "actor/loss" not in first
        assert same
        assert "2 updates in a row" in message and "trainer.max_bad_steps" in message
        assert "the loss nan and the gradient norm nan were not finite" in message


def update_with(model, changes, batch, scale, max_norm):
    """Of a batch whose advantages are `scale` times as large."""
    changes = changes | {"max_grad_norm": max_norm}
    actor = make_actor(model, "ppo", max_bad_steps=2, **changes)
    batch = batch | {"advantages": batch["advantages"] * scale}
    return actor.update(batch if rank() == 0 else None, 1), whole(actor)


@pytest.mark.parametrize(
    ("n_ranks", "changes"), [(1, {}), (2, {}), (2, {"ddp_size": 2}), (2, {"tp_size": 2})]
)
def test_a_norm_whose_squares_float32_does_not_hold_is_clipped_like_others(
    tmp_path, n_ranks, changes
):
    model, batch, scale = make_model(tmp_path), make_batch(), 2.0**80
    batch["advantages"][0] *= 1e3  # of one sample
    small = run_on_ranks(n_ranks, update_with, model, changes, batch, 1.0, 1e-2)
    large = run_on_ranks(n_ranks, update_with, model, changes, batch, scale, 1e-2)
    for (expected, after), (metrics, weights) in zip(small, large, strict=True):
        assert metrics["actor/nonfinite"] == 0.0
        assert metrics["actor/grad_norm"] / scale == pytest.approx(expected["actor/grad_norm"])
        for name, weight in weights.items():
            torch.testing.assert_close(weight, after[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_norm_that_is_not_clipped_below_what_float32_squares_is_left_out(tmp_path):
    """The moments of AdamW, which are squares, would be infinite, and the weights stand still."""
    arguments = (make_model(tmp_path), {}, make_batch(), 2.0**80, 1e20)
    ((metrics, _),) = run_on_ranks(1, update_with, *arguments)
    assert metrics["actor/nonfinite"] == 1.0 and "actor/loss" not in metrics


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (float("nan"), 0.25, "the loss nan was not finite (the gradient norm 0.25 was)"),
        (1.5, float("inf"), "the gradient norm inf was not finite (the loss 1.5 was)"),
    ],
)
def test_what_was_not_finite_is_named_and_no_more(loss, norm, said):
    assert not_finite(loss, norm) == said


def frozen_then_not(model, batch):
    actor = make_actor(model, freeze_steps=1)
    return actor.update(batch, 1), actor.update(batch, 2)["actor/loss"]


def test_freeze_steps_leave_the_actor_alone(tmp_path):
    ((frozen, loss),) = run_on_ranks(1, frozen_then_not, make_model(tmp_path), as_spo(make_batch()))
    assert frozen == {} and loss > 0


PAIRS = {"pair_ids": torch.tensor([0, 0, 1, 1]), "chosen": torch.tensor([1, 0, 0, 1]).bool()}
CANNOT = [
    ({}, {}, "names pairs, but this run's batches have no pair_ids and chosen; use a source that"),
    (PAIRS, {"max_length_per_device": 20}, r"takes pairs whole, but the pair 0 has \d+ tokens and"),
]


def refused(model, batch, changes):
    with pytest.raises(TrainingError) as caught:
        one_update(model, "dpo", changes, batch)
    return str(caught.value)


@pytest.mark.parametrize(("fields", "changes", "said"), CANNOT)
def test_a_batch_that_a_loss_of_pairs_cannot_take_is_one_line_on_all_ranks(
    tmp_path, fields, changes, said
):
    batch = make_batch(n_rows=4) | fields
    batch["ref_logps"] = batch["old_logps"]
    for line in run_on_ranks(2, refused, make_model(tmp_path), batch, changes):
        assert re.match(f"actor.loss.name=dpo: {said}", line)
        assert "\n" not in line


def kl_update(model, batch, kl):
    return make_actor(model, loss="ppo", kl=kl, avg_level="token").update(batch, 1)


def test_kl_to_the_reference_enters_the_loss_as_asked(tmp_path):
    model = make_model(tmp_path)
    batch = make_batch()
    batch["ref_logps"] = batch["old_logps"] - 0.3 * batch["action_mask"]
    (without,) = run_on_ranks(1, kl_update, model, batch, {"coef": 0.0, "type": None})
    (with_kl,) = run_on_ranks(1, kl_update, model, batch, {"coef": 0.5, "type": "loss"})
    assert with_kl["actor/kl"] > 0
    assert with_kl["actor/loss"] == pytest.approx(
        without["actor/loss"] + 0.5 * with_kl["actor/kl"], rel=1e-5
    )


def load_missing(folder):
    try:
        make_actor(folder)
    except ConfigError as error:
        return str(error)


def test_a_folder_without_a_model_is_named(tmp_path):
    (message,) = run_on_ranks(1, load_missing, str(tmp_path))
    assert f"actor.model_name={tmp_path}" in message


def load_scaled_logits(folder):
    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for implementation in ("auto", "naive"):
        make_actor(str(folder), token_stats=implementation)
    with pytest.raises(ConfigError) as error:
        make_actor(str(folder), token_stats="tiled")
    return str(error.value)


def test_a_head_that_is_not_linear_refuses_tiles_by_name(tmp_path):
    (message,) = run_on_ranks(1, load_scaled_logits, tmp_path)
    assert message.startswith("actor.token_stats=tiled: ") and message.endswith("use auto")


def test_the_logged_rate_is_the_one_that_was_used(tmp_path):
    model, batch = make_model(tmp_path), as_spo(make_batch())
    changes = {"scheduler": "linear", "warmup_ratio": 0.2}  # of 10 updates: 0, 0.5, 1, 0.875, …
    (rates,) = run_on_ranks(1, three_rates, model, changes, batch)
    assert rates == pytest.approx([0.0, 5e-4, 1e-3])


def three_rates(model, changes, batch):
    actor = make_actor(model, **changes)
    return [actor.update(batch, step)["actor/lr"] for step in (1, 2, 3)]


def tis_update(model, batch, kind, coef):
    actor = make_actor(model, "ppo", tis_type=kind, tis_coef=coef, avg_level="token")
    return actor.update(batch, 1)


def two_updates(model, loss, batch, changes):
    """Of one rollout, by an engine that is the trainer: metrics of each alone and of both."""
    actor = make_actor(model, loss, avg_level="token", lr=0.03, update_per_rollout=2, **changes)
    batch = actor.annotate(batch, {"old_logps": "logps"})
    batch |= {"llm_logps": batch["old_logps"]}
    if not actor.config.tis_coef:  # nobody has asked for them
        del batch["old_logps"]
    return actor.update(batch, 1), whole(actor)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("loss", ["ppo", "spo"])
def test_an_engine_that_is_the_trainer_weighs_one_in_every_update(tmp_path, loss, kind):
    """Also in the second one, whose own logps have moved away by a factor of two and more."""
    model, batch = make_model(tmp_path), make_batch()
    changes = {"tis_coef": 1.5, "tis_type": kind}
    ((found, weights),) = run_on_ranks(1, two_updates, model, loss, batch, changes)
    plain = {} if loss == "spo" else {"tis_coef": 1e30}
    ((expected, other),) = run_on_ranks(1, two_updates, model, loss, batch, plain)
    assert found["actor/loss"] == expected["actor/loss"]
    assert found.get("actor/tis_masked", 0.0) == 0.0
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    # What engine and trainer differ by is not what the trainer has moved by since.
    for metrics in (found, expected):
        assert metrics["rollout/llm_kl"] == pytest.approx(0, abs=1e-9)


def test_masked_tokens_teach_nothing_and_their_share_is_told(tmp_path):
    """Engine and trainer agree but on some tokens, which are then as if they had no advantage."""
    model, batch = make_model(tmp_path), make_batch()
    del batch["old_logps"]
    (own,) = run_on_ranks(1, compute_logps, model, batch, 1)
    mask, off = batch["action_mask"], torch.zeros_like(batch["action_mask"])
    off[::2, ::3] = True
    off &= mask
    either_side = torch.where(torch.arange(len(mask)) % 4 == 0, 1.0, -1.0)[:, None]
    batch["llm_logps"] = own + off * either_side
    without = batch | {"advantages": batch["advantages"] * ~off, "llm_logps": own}
    (masked,) = run_on_ranks(1, tis_update, model, batch, "mask", 2.0)
    (reference,) = run_on_ranks(1, tis_update, model, without, "mask", 2.0)
    share = off.sum().item() / mask.sum().item()
    assert 0.1 < share < 0.9
    assert masked["actor/tis_masked"] == pytest.approx(share)
    assert reference["actor/tis_masked"] == 0
    for name in ("actor/loss", "actor/grad_norm"):
        assert masked[name] == pytest.approx(reference[name], rel=1e-4)
    (truncated,) = run_on_ranks(1, tis_update, model, batch, "truncate", 2.0)
    assert "actor/tis_masked" not in truncated
    assert truncated["actor/grad_norm"] != pytest.approx(masked["actor/grad_norm"], rel=1e-3)
