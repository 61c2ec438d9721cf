"""A vocabulary split over gloo ranks gives the statistics and gradients of the whole one."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config, Qwen3MoeConfig

from RL2.distributed import ProcessGroupShard, rank, shard_of
from RL2.distributed.tensor_parallel import tensor_parallel_plan
from RL2.runtime.errors import ConfigError
from tests.ops.token_stats.support import (
    NEG_INF,
    STATISTICS,
    Tiling,
    as_linear,
    gradients,
    leaves,
    loss_of,
    random_case,
    some_tokens,
    stats_of,
    unseen,
)
from tests.ranks import run_on_ranks

V, H, PADDING = 11, 5, 3
TILING = Tiling(columns=4, rows=50, kept=4, fewest=1)

# How many columns each rank has; None: what shard_of gives (6 5 and 3 3 3 2).
LAYOUTS = {2: (None, (1, 10), (0, 11), (11, 0)), 4: (None, (1, 0, 8, 2), (0, 5, 6, 0))}


def _shard(layout):
    if layout is None:
        return shard_of(V)
    own = rank()
    return ProcessGroupShard(None, sum(layout[:own]), layout[own], max(layout))


# ---------------------------------------------- cases: hidden, weight, bias, actions


def every_maximum_and_action(dtype):
    """Each pair of columns once as (maximum, action), half of them near certain."""
    maxima, actions = torch.arange(V).repeat_interleave(V), torch.arange(V).repeat(V)
    logits = torch.randn(V * V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    height = torch.where(torch.arange(V * V) % 2 == 0, 40.0, 5.0)
    logits[torch.arange(V * V), maxima] = height.double()
    return *(x.to(dtype) for x in as_linear(logits)), actions


def every_tie(dtype):
    """Each pair of columns once as two equal maxima; the action is the one, the other, a third."""
    pairs = torch.combinations(torch.arange(V))
    logits = torch.linspace(-1, 1, V).repeat(3 * len(pairs), 1)
    actions = torch.cat([pairs[:, 0], pairs[:, 1], (pairs[:, 1] + 1) % V])
    logits.scatter_(1, pairs.repeat(3, 1), 3.0)
    return *(x.to(dtype) for x in as_linear(logits)), actions


def impossible_columns(dtype):
    """-inf in the first columns, which fill whole shards, and in the last."""
    hidden, weight, bias, actions = random_case(T=30, H=H, V=V, dtype=dtype)
    bias[:4] = bias[-1] = NEG_INF
    return hidden, weight, bias, 4 + actions % (V - 5)


def without_bias(dtype):
    hidden, weight, _, actions = random_case(T=31, H=H, V=V, dtype=dtype, scale=3.0)
    return hidden, weight, None, actions


def few_tokens(dtype, T=1):
    return random_case(T=T, H=H, V=V, dtype=dtype)


CASES = {
    "every maximum and action": every_maximum_and_action,
    "every tie": every_tie,
    "impossible columns": impossible_columns,
    "without bias": without_bias,
    "one token": few_tokens,
    "no token": functools.partial(few_tokens, T=0),
}


def token_weights(n, dtype):
    """Half of the tokens owe nothing."""
    return torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype).relu()


def results_of(implementation, case, dtype, entry, trained=(True, True), layout=None):
    """{name: tensor}: statistics or loss and metrics, and gradients, on this rank's shard."""
    hidden, weight, bias, actions = CASES[case](dtype)
    options = {}
    if implementation != "naive":
        shard = _shard(layout)
        own = slice(shard.start, shard.start + shard.columns)
        # Rows past the shard's columns are padding, and must not be looked at.
        padding = torch.full((PADDING, weight.shape[1]), float("nan"), dtype=dtype)
        weight = torch.cat([weight[own], padding])
        bias = None if bias is None else torch.cat([bias[own], padding[:, 0]])
        options = {"shard": shard, "tiling": TILING}
    hidden, weight, bias = inputs = leaves(hidden, weight, bias)
    for tensor, trains in zip(inputs, trained, strict=False):
        tensor.requires_grad_(trains)
    weights = token_weights(len(actions), dtype)

    def loss_fn(stats, rows):
        return (unseen(stats) * weights[rows]).sum(), {"ranks": stats.ranks.sum()}

    options["at"] = some_tokens(actions, V)
    arguments = (hidden, weight, actions, 0.7, (*STATISTICS, "at_logps"))
    if entry == "stats":
        stats = stats_of(implementation, *arguments, bias, **options)
        found = stats.as_dict()
        loss = loss_fn(stats, slice(0, len(actions)))[0]
    else:
        loss, found = loss_of(implementation, *arguments, loss_fn, bias, **options)
        found = {"loss": loss, **found}
    found = {name: value.detach() for name, value in found.items()}
    for name, gradient in zip(("hidden", "weight", "bias"), gradients(loss, inputs), strict=True):
        if gradient is not None:
            found[f"d_{name}"] = gradient
    return found


def all_cases(dtype, layout):
    return {
        (entry, case): results_of("tiled", case, dtype, entry, layout=layout)
        for entry in ("stats", "loss")
        for case in CASES
    }


def check(by_rank, expected, columns, tolerance):
    """Replicated results are the same bits on every rank; shards together are the whole."""
    for name, whole in expected.items():
        parts = [results[name] for results in by_rank]
        if name in ("d_weight", "d_bias"):
            assert not any(part[n:].any() for part, n in zip(parts, columns, strict=True))
            found = torch.cat([part[:n] for part, n in zip(parts, columns, strict=True)])
        else:
            found = parts[0]
            assert all(torch.equal(found, part) for part in parts), name
        torch.testing.assert_close(found, whole, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-5)])
@pytest.mark.parametrize("n_ranks, layout", [(n, x) for n in LAYOUTS for x in LAYOUTS[n]])
def test_equals_the_whole_vocabulary(n_ranks, layout, dtype, tolerance):
    by_rank = run_on_ranks(n_ranks, all_cases, dtype, layout)
    columns = layout or [len(part) for part in torch.arange(V).chunk(n_ranks)]
    for entry, case in by_rank[0]:
        expected = results_of("naive", case, dtype, entry)
        check([results[entry, case] for results in by_rank], expected, columns, tolerance)


TRAINED = [(True, False), (False, True)]


def partly_trained():
    return [
        results_of("tiled", "without bias", torch.float64, entry, trained)
        for entry in ("stats", "loss")
        for trained in TRAINED
    ]


def test_frozen_head_and_frozen_hidden():
    by_rank = run_on_ranks(2, partly_trained)
    for i, (entry, trained) in enumerate((e, t) for e in ("stats", "loss") for t in TRAINED):
        expected = results_of("naive", "without bias", torch.float64, entry, trained)
        assert ("d_hidden" in expected, "d_weight" in expected) == trained
        check([results[i] for results in by_rank], expected, (6, 5), 1e-12)


def shapes_of_shards(sizes):
    shards = [shard_of(size) for size in sizes]
    return [(shard.start, shard.columns, shard.widest) for shard in shards]


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_shard_of_follows_chunk(n_ranks):
    sizes = [1, 2, 5, 6, 8, 9, 11, 151936]
    by_rank = run_on_ranks(n_ranks, shapes_of_shards, sizes)
    for i, size in enumerate(sizes):
        chunks = [len(part) for part in torch.arange(size).chunk(n_ranks)]
        chunks += [0] * (n_ranks - len(chunks))
        starts = [sum(chunks[:r]) for r in range(n_ranks)]
        expected = [(start, n, max(chunks)) for start, n in zip(starts, chunks, strict=True)]
        assert [shapes[i] for shapes in by_rank] == expected


def collectives():
    shard = shard_of(V)
    columns = torch.arange(6.0).view(3, 2).T + 10 * rank()  # not contiguous
    gathered = shard.all_gather(columns)
    shard.all_reduce(columns)
    return gathered, columns, shard.all_gather(torch.empty(6, 0)).shape


def test_collectives():
    first = torch.arange(6.0).view(3, 2).T
    for gathered, total, empty in run_on_ranks(2, collectives):
        assert torch.equal(gathered, torch.stack([first, first + 10]))
        assert torch.equal(total, 2 * first + 10)
        assert empty == (2, 6, 0)


def test_shard_of_refuses():
    with pytest.raises(RuntimeError, match="vocab_size=0"):
        run_on_ranks(2, shard_of, 0)


# ------------------------------------------------------------------------------ decoders

TINY = {
    "vocab_size": 67, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 3,
}  # fmt: skip


def plan_of(config, size):
    with torch.device("meta"):
        return tensor_parallel_plan(AutoModelForCausalLM.from_config(config), size)


def test_the_plan_names_modules():
    plan = plan_of(Qwen3Config(**TINY), 3)
    layer = "model.layers.0"
    assert plan == {
        f"{layer}.self_attn.q_proj": "colwise",
        f"{layer}.self_attn.k_proj": "colwise",
        f"{layer}.self_attn.v_proj": "colwise",
        f"{layer}.self_attn.q_norm": "replicated_with_grad_allreduce",
        f"{layer}.self_attn.k_norm": "replicated_with_grad_allreduce",
        f"{layer}.self_attn.o_proj": "rowwise",
        f"{layer}.mlp.gate_proj": "colwise",
        f"{layer}.mlp.up_proj": "colwise",
        f"{layer}.mlp.down_proj": "rowwise",
    }


@pytest.mark.parametrize(
    "config, size, message",
    [
        (GPT2Config(n_embd=24, n_head=6, n_layer=1), 2, "no tensor-parallel plan for gpt2 models"),
        (Qwen3MoeConfig(**TINY, num_experts=2), 3, "qwen3_moe models has moe_tp_experts"),
        (Qwen3Config(**TINY), 2, "actor.tp_size=2: must divide num_key_value_heads=3"),
        (
            Qwen3Config(**TINY | {"vocab_size": 4}), 3,
            "actor.tp_size=3: leaves a rank without any of the vocab_size=4 columns",
        ),
        (Qwen3Config(**TINY), 4, "actor.tp_size=4: must divide num_attention_heads=6"),
        (
            Qwen3Config(**TINY | {"intermediate_size": 37}), 3,
            "must divide the width 37 of model.layers.0.mlp.gate_proj",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_split_are_refused(config, size, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(config, size)


def test_what_stands_between_split_layers_and_has_no_plan_is_named():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY))
        model.model.layers[0].mlp.scale = torch.nn.Parameter(torch.ones(36))
    message = r"actor.tp_size=3: model.layers.0.mlp.scale \[36\] is between split layers"
    with pytest.raises(ConfigError, match=message):
        tensor_parallel_plan(model, 3)
