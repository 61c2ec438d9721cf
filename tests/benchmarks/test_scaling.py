"""The costs on paper against updates of tiny models on two ranks, and the tables in the docs."""

import math
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from benchmarks import cost
from benchmarks.cost import FP32, MODELS, Spread
from RL2.distributed import Layout, build_mesh, full_tensors, rank
from RL2.ops import attention as ops_attention
from RL2.ops.attention import register_attention
from tests.ranks import run_on_ranks
from tests.workers.test_actor import make_actor, make_batch

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": 67, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "tied": Qwen3Config(
        **SIZES, intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=True
    ),
    "untied": Qwen3Config(
        **SIZES, intermediate_size=80, num_hidden_layers=3, tie_word_embeddings=False
    ),
    "moe": Qwen3MoeConfig(
        **SIZES, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=False,
        moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2,
    ),
}  # fmt: skip
SPREADS = {
    "fsdp": Spread(2), "ddp": Spread(2, ddp_size=2), "tp": Spread(2, tp_size=2),
    "sp": Spread(2, sp_size=2), "hsdp": Spread(4, ddp_size=2), "fsdp_tp": Spread(4, tp_size=2),
}  # fmt: skip
BYTES = {"float32": 4, "bfloat16": 2}


def build(name: str, layers: int | None = None, **options) -> torch.nn.Module:
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options)


# ------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("config", [*MODELS.values(), *CONFIGS.values()])
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert cost.n_parameters(config) == sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.base_model.layers[0].parameters())
    assert sum(math.prod(weight.shape) for weight in cost.layer_weights(config)) == layer


def test_only_some_experts_and_no_embedding_are_multiplied_with_a_token():
    dense, moe = CONFIGS["untied"], CONFIGS["moe"]
    embedding = 67 * 32
    assert cost.n_parameters(dense) - cost.n_parameters(dense, active=True) == embedding
    idle = 2 * (6 - 2) * 3 * 32 * 24  # layers, experts, matrices
    assert cost.n_parameters(moe) - cost.n_parameters(moe, active=True) == embedding + idle
    assert cost.n_parameters(CONFIGS["tied"]) == cost.n_parameters(CONFIGS["tied"], active=True)


def shape_of_mesh(ddp_size: int, tp_size: int) -> tuple[int, ...]:
    return tuple(build_mesh("cpu", ddp_size, tp_size).shape)


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_a_spread_is_that_of_the_library(spread):
    shape = (spread.ddp_size, spread.fsdp_size, spread.tp_size)
    n_ranks = spread.n_ranks
    found = run_on_ranks(n_ranks, shape_of_mesh, spread.ddp_size, spread.tp_size)
    assert found == [shape] * n_ranks
    assert Layout(n_ranks, spread.sp_size, spread.tp_size).dp_size == spread.dp_size


# ------------------------------------------------------------------------------ measured updates


class Collectives(TorchDispatchMode):
    """Counts the payload of collectives among two ranks or more, by kind and dtype."""

    def __init__(self):
        super().__init__()
        self.payload: Counter[tuple[str, torch.dtype]] = Counter()

    # Which argument of c10d's in-place operations is the whole tensor, and which the group.
    _IN_PLACE = {
        "_allgather_base_": ("all_gather", 0, 2),
        "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
        "allreduce_": ("all_reduce", 0, 1),
        "scatter_": ("scatter", 0, 2),
    }
    # Of the functional ones, whose input comes first and the group's name last.
    _FUNCTIONAL = {
        "all_gather_into_tensor": "all_gather",
        "all_reduce": "all_reduce",
        "all_to_all_single": "all_to_all",
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in self._IN_PLACE:
            kind, whole, group = self._IN_PLACE[name]
            self._count(kind, args[whole], dist.ProcessGroup.unbox(args[group]))
        elif func.namespace == "_c10d_functional" and name in self._FUNCTIONAL:
            group = dist.distributed_c10d._resolve_process_group(args[-1])
            times = group.size() if name == "all_gather_into_tensor" else 1
            self._count(self._FUNCTIONAL[name], args[0], group, times)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, tensors, group: dist.ProcessGroup, times: int = 1) -> None:
        if group.size() > 1:
            for tensor in tree_leaves(tensors):
                self.payload[kind, tensor.dtype] += times * tensor.nbytes


def measured_update(folder: str, changes: dict) -> dict:
    """What an update of one rank held and sent."""
    actor = make_actor(folder, "ppo", max_length_per_device=24, **changes)
    seen = {"micro_batches": 0, "tokens": 0, "actions": 0}
    forward, held = actor.forward, {}

    def counted(micro_batch, *args, **kwargs):
        seen["micro_batches"] += 1
        seen["tokens"] += len(micro_batch["states"])
        seen["actions"] += len(micro_batch["actions"])
        return forward(micro_batch, *args, **kwargs)

    def look_at_gradients(*_):
        held["gradients"] = local_bytes(p.grad for p in actor.model.parameters())

    actor.forward = counted
    actor.optimizer.register_step_pre_hook(look_at_gradients)
    batch = make_batch(n_rows=9)
    del batch["old_logps"]  # no ratio is clipped then: every action has a gradient
    with Collectives() as collectives:
        actor.update(batch if rank() == 0 else None, 1)
    held["weights"] = local_bytes(actor.model.parameters())
    held["moments"] = sum(
        local_bytes([state["exp_avg"], state["exp_avg_sq"]])
        for state in actor.optimizer.state.values()
    )
    with Collectives() as sync:
        for _ in full_tensors(actor.hf_model):
            pass
    return {"held": held, "payload": dict(collectives.payload), "sync": dict(sync.payload), **seen}


def local_bytes(tensors) -> int:
    return sum(tensor.to_local().nbytes for tensor in tensors)


WAYS = {"fp32": ("float32", False), "bf16_recomputed": ("bfloat16", True)}
CASES = [(name, spread) for spread in ("fsdp", "ddp", "sp") for name in CONFIGS]
TENSOR_PARALLEL = [("tied", "tp"), ("untied", "tp")]  # not of mixtures of experts
ON_FOUR_RANKS = [("untied", "hsdp"), ("untied", "fsdp_tp")]


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """`measure(name, spread, way)`: `measured_update` by rank, of each case once."""
    folder = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        build(name).save_pretrained(folder / name)

    @cache
    def measured(name: str, spread: str, way: str) -> list[dict]:
        dtype, checkpointing = WAYS[way]
        changes = {"dtype": dtype, "gradient_checkpointing": checkpointing}
        for key in ("ddp_size", "sp_size", "tp_size"):
            changes[key] = getattr(SPREADS[spread], key)
        ranks = run_on_ranks(SPREADS[spread].n_ranks, measured_update, str(folder / name), changes)
        assert all(one["micro_batches"] > 1 for one in ranks)
        return ranks

    return measured


@pytest.mark.parametrize(("name", "spread"), CASES + TENSOR_PARALLEL + ON_FOUR_RANKS)
def test_state_is_what_an_actor_holds_after_an_update(measure, name, spread):
    expected = cost.state_bytes(CONFIGS[name], SPREADS[spread])
    for what, n_bytes in expected.items():
        assert max(one["held"][what] for one in measure(name, spread, "fp32")) == n_bytes, what


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "spread"), [*CASES, ("untied", "hsdp")])
def test_fsdp_moves_what_the_formula_says(measure, name, spread, way):
    dtype, _ = WAYS[way]
    for one in measure(name, spread, way):
        expected = cost.fsdp_payload(
            CONFIGS[name], SPREADS[spread], BYTES[dtype], micro_batches=one["micro_batches"]
        )
        payload = Counter(one["payload"])
        assert payload["all_gather", getattr(torch, dtype)] == expected["all_gather"]
        assert payload["reduce_scatter", torch.float32] == expected["reduce_scatter"]
        norms = payload["all_reduce", torch.float32] - expected["all_reduce"]
        assert 0 <= norms <= 2 * FP32  # the norm of the gradients


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_tensor_parallelism_moves_what_the_formula_says(measure, name, way):
    config, (dtype, checkpointing) = CONFIGS[name], WAYS[way]
    for one in measure(name, "tp", way):
        expected = cost.tp_payload(
            config, SPREADS["tp"], one["tokens"], BYTES[dtype], n_actions=one["actions"],
            checkpointing=checkpointing,
        )  # fmt: skip
        payload = Counter(one["payload"])
        reduced = sum(payload["all_reduce", getattr(torch, d)] for d in BYTES)
        # Once an update: gradients of the norms of queries and keys, and the norm of all gradients.
        norms = config.num_hidden_layers * 2 * config.head_dim * FP32
        assert 0 <= reduced - norms - expected["all_reduce"] <= 4 * FP32
        assert payload["all_gather", torch.float32] == expected["all_gather"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_sequence_parallelism_moves_what_the_formula_says(measure, name, way):
    dtype, checkpointing = WAYS[way]
    for one in measure(name, "sp", way):
        assert one["payload"]["all_to_all", getattr(torch, dtype)] == cost.sp_payload(
            CONFIGS[name], SPREADS["sp"], one["tokens"], BYTES[dtype], checkpointing=checkpointing
        )


@pytest.mark.parametrize(("name", "spread"), CASES + TENSOR_PARALLEL + ON_FOUR_RANKS)
def test_new_weights_move_what_the_formula_says(measure, name, spread):
    expected = cost.sync_payload(CONFIGS[name], SPREADS[spread])["all_gather"]
    found = [Counter(one["sync"]) for one in measure(name, spread, "fp32")]
    assert max(payload["all_gather", torch.float32] for payload in found) == expected


@pytest.mark.parametrize("spread", SPREADS)
def test_a_batch_moves_what_the_formula_says(measure, spread):
    ranks = measure("untied", spread, "fp32")
    # Shares are padded to the largest, and to 8 bytes.
    share = cost.scatter_payload(Spread(), max(one["tokens"] for one in ranks))
    for one in ranks:
        assert one["payload"]["scatter", torch.uint8] == -(-share // 8) * 8


# --------------------------------------------------------------------------------- activations


def kept_bytes(model: torch.nn.Module, n_tokens: int) -> int:
    """What autograd keeps of a forward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    offsets = torch.tensor([0, n_tokens], dtype=torch.int32)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(
            input_ids=torch.zeros(1, n_tokens, dtype=torch.int64),
            position_ids=torch.arange(n_tokens)[None], use_cache=False,
            cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
            max_length_q=n_tokens, max_length_k=n_tokens,
        )  # fmt: skip
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_what_autograd_keeps(monkeypatch, name, dtype):
    attention, n_tokens = register_attention(), 64
    monkeypatch.setattr(ops_attention, "_one_by_one", ops_attention._side_by_side)  # as on a GPU

    def layer(checkpointing: bool) -> float:
        found = []
        for layers in (1, 2):
            options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
            model = build(name, layers, **options).train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            found.append(kept_bytes(model, n_tokens))
        return (found[1] - found[0]) / n_tokens

    size, config = BYTES[dtype], CONFIGS[name]
    assert layer(checkpointing=True) == cost.checkpoint_bytes(config, size)
    expected = cost.activation_bytes(config, Spread(), size, flash=False)
    few = FP32 * config.num_experts / n_tokens if name == "moe" else 0  # tokens of each expert
    assert layer(checkpointing=False) == pytest.approx(expected + few, abs=1e-6)


# --------------------------------------------------------------------------------------- paper


def test_the_tables_of_the_docs_are_what_the_command_prints():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "cost.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in text
    for n_gpus in (8, 64, 512):
        assert printed.count(f"\n| {n_gpus} |") >= len(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_spreads_on_paper_are_possible(name):
    config = MODELS[name]
    for spread in cost.SPREADS[name]:
        sizes = (spread.ddp_size * spread.tp_size, spread.sp_size * spread.tp_size)
        assert all(spread.n_ranks % size == 0 for size in sizes)
        assert config.num_attention_heads % (spread.sp_size * spread.tp_size) == 0
        assert config.num_key_value_heads % spread.tp_size == 0
        assert spread.tp_size == 1 or not cost.is_moe(config)
