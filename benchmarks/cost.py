"""Memory and communication of an update on paper: what a rank holds, and what crosses ranks.

    python benchmarks/cost.py             the tables of docs/scaling.md
    python benchmarks/cost.py --tokens 32768

Pure functions of a transformers config (Qwen3 and Qwen3-MoE shapes) and a `Spread`. Sizes are bytes
on the rank that has most; a *payload* is the size of the whole tensor that a collective gathers,
reduces or exchanges on a rank, `sent` is what of that leaves a rank with ring algorithms.
`tests/benchmarks/test_scaling.py` holds them against updates of tiny models on two ranks.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig  # noqa: E402

from RL2.distributed.mesh import Layout  # noqa: E402
from RL2.distributed.sequence_parallel import kv_repeats  # noqa: E402
from RL2.ops.token_stats.tiling import TILINGS  # noqa: E402

FP32, BF16 = 4, 2
GIB = 2**30


@dataclass(frozen=True)
class Spread:
    """How an actor lies on its ranks: `actor.ddp_size`, `actor.sp_size`, `actor.tp_size`."""

    n_ranks: int = 1
    ddp_size: int = 1
    sp_size: int = 1
    tp_size: int = 1

    @property
    def fsdp_size(self) -> int:
        """Ranks that a model, or a tensor-parallel part of it, is sharded over."""
        return self.n_ranks // (self.ddp_size * self.tp_size)

    @property
    def dp_size(self) -> int:
        """Micro-batches that are worked on at a time."""
        return Layout(self.n_ranks, self.sp_size, self.tp_size).dp_size


# ------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Weight:
    """A parameter and the dimension along which tensor parallelism cuts it (None: it does not)."""

    shape: tuple[int, ...]
    cut: int | None = None

    def local(self, tp_size: int) -> tuple[int, ...]:
        """Shape of a tensor-parallel rank's part."""
        return tuple(-(-n // tp_size) if dim == self.cut else n for dim, n in enumerate(self.shape))

    def fsdp_dim(self, spread: Spread) -> int:
        """FSDP cuts the first dimension, or the second where tensor parallelism has cut the first
        and it goes evenly."""
        by_tp = self.cut == 0 and spread.tp_size > 1 and len(self.shape) > 1
        return int(by_tp and self.shape[1] % spread.fsdp_size == 0)

    def shard(self, spread: Spread) -> int:
        """Numbers that a rank keeps of it."""
        return _shard(self.local(spread.tp_size), self.fsdp_dim(spread), spread.fsdp_size)

    def gathered(self, spread: Spread) -> int:
        """Numbers in a tensor-parallel rank's part, with the padding that FSDP gathers along."""
        return self.shard(spread) * spread.fsdp_size

    def whole(self, spread: Spread) -> int:
        """The same of the parameter itself."""
        return spread.fsdp_size * _shard(self.shape, self.fsdp_dim(spread), spread.fsdp_size)


def _shard(shape: tuple[int, ...], dim: int, n: int) -> int:
    """Numbers in the largest of n parts, as `torch.chunk` makes them."""
    return -(-shape[dim] // n) * (math.prod(shape) // shape[dim])


def is_moe(config: PretrainedConfig) -> bool:
    return getattr(config, "num_experts", None) is not None


def layer_weights(config: PretrainedConfig) -> list[Weight]:
    """Of one decoder layer."""
    hidden, width = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    attention = [
        Weight((queries, hidden), 0), Weight((keys, hidden), 0), Weight((keys, hidden), 0),
        Weight((hidden, queries), 1), Weight((width,)), Weight((width,)),
    ]  # fmt: skip
    norms = [Weight((hidden,)), Weight((hidden,))]
    if is_moe(config):
        inner, n = config.moe_intermediate_size, config.num_experts
        experts = [Weight((n, 2 * inner, hidden)), Weight((n, hidden, inner))]
        return [*attention, *norms, Weight((n, hidden)), *experts]
    inner = config.intermediate_size
    up, down = Weight((inner, hidden), 0), Weight((hidden, inner), 1)
    return [*attention, *norms, up, up, down]


def outer_weights(config: PretrainedConfig) -> list[Weight]:
    """Embedding, last norm and head: what FSDP holds at the root."""
    vocabulary = Weight((config.vocab_size, config.hidden_size), 0)
    return [vocabulary, Weight((config.hidden_size,))] + (
        [] if config.tie_word_embeddings else [vocabulary]
    )


def n_parameters(config: PretrainedConfig, active: bool = False) -> int:
    """All of them, or those that one token is multiplied with (not the embedding; of experts,
    those that it is sent to)."""
    layer = sum(math.prod(w.shape) for w in layer_weights(config))
    outer = sum(math.prod(w.shape) for w in outer_weights(config))
    if active and is_moe(config):
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        layer -= (config.num_experts - config.num_experts_per_tok) * expert
    if active and not config.tie_word_embeddings:
        outer -= config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer + outer


# ------------------------------------------------------------------------------------- memory


def state_bytes(config: PretrainedConfig, spread: Spread) -> dict[str, int]:
    """Sharded weights, both moments of AdamW and gradients, all in fp32."""
    layer = sum(weight.shard(spread) for weight in layer_weights(config))
    outer = sum(weight.shard(spread) for weight in outer_weights(config))
    n = config.num_hidden_layers * layer + outer
    return {"weights": FP32 * n, "moments": 2 * FP32 * n, "gradients": FP32 * n}


def layer_bytes(config: PretrainedConfig, spread: Spread, dtype: int = BF16) -> int:
    """A gathered layer."""
    return dtype * sum(weight.gathered(spread) for weight in layer_weights(config))


def outer_bytes(config: PretrainedConfig, spread: Spread, dtype: int = BF16) -> int:
    """Embedding, norm and head, gathered: they stay from their forward to their backward."""
    return dtype * sum(weight.gathered(spread) for weight in outer_weights(config))


def activation_bytes(
    config: PretrainedConfig, spread: Spread, dtype: int = BF16, flash: bool = True
) -> int:
    """What autograd keeps of one layer for each of a rank's tokens, without checkpointing.

    flash: attention by a kernel that takes packs; False: `sdpa_varlen`, which copies
        them on a GPU.
    """
    tp = spread.tp_size
    hidden, width = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
    # Per norm: its input in fp32, 1/rms, the normalised input, and the output for the products.
    norms = 2 * (FP32 * hidden + FP32 + 2 * dtype * hidden)
    norms += (heads + kv_heads) * (width * (FP32 + dtype) + FP32)
    kept = heads + 2 * kv_heads * kv_repeats(heads, kv_heads, spread.sp_size)  # query, key, value
    attention = dtype * width * (kept + heads) + FP32 * heads
    if not flash:
        attention += dtype * width * (kept + heads) + 8
    return norms + attention + _mlp_bytes(config, dtype, tp)


def _mlp_bytes(config: PretrainedConfig, dtype: int, tp_size: int) -> int:
    if not is_moe(config):  # gate, act(gate), up, their product
        return 4 * dtype * config.intermediate_size // tp_size
    # For each expert of a token its input, the same four, its output, its weight, three indices.
    expert = dtype * (2 * config.hidden_size + 4 * config.moe_intermediate_size + 1) + 3 * 8
    router = FP32 * config.num_experts + 8 * config.num_experts_per_tok
    return config.num_experts_per_tok * expert + router


def checkpoint_bytes(config: PretrainedConfig, dtype: int = BF16) -> int:
    """What is kept of one layer for each token with `actor.gradient_checkpointing`: its input."""
    return dtype * config.hidden_size


def head_bytes(config: PretrainedConfig, spread: Spread, n_tokens: int, dtype: int = BF16) -> int:
    """The head's working memory in an update, on a GPU: tiles of logits, and the gradients of its
    weight and of the hidden states in fp32; never the logits `[n_tokens, vocabulary]`."""
    columns = -(-config.vocab_size // spread.tp_size)
    tiles = FP32 * n_tokens * min(TILINGS["cuda"].kept, columns)
    gradients = FP32 * config.hidden_size * (columns + n_tokens)
    return tiles + gradients + dtype * n_tokens * config.hidden_size


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the fullest moment of an update, by what they are.

    state: sharded weights, moments, gradients. activations: of all layers, and of the one that is
    computed again. gathered: whole weights and gradients in passing. head: its working memory.
    """

    state: int
    activations: int
    gathered: int
    head: int

    @property
    def total(self) -> int:
        return self.state + self.activations + self.gathered + self.head


def peak(
    config: PretrainedConfig, spread: Spread, n_tokens: int, *, checkpointing: bool = True
) -> Memory:
    """The fullest of three moments: the head; the first layer backwards, next to the one that
    FSDP fetches ahead; and the end, where the root's gradients are reduced.

    n_tokens: of one forward on a rank (`actor.max_length_per_device`).
    """
    state = sum(state_bytes(config, spread).values())
    layer, outer = layer_bytes(config, spread), outer_bytes(config, spread)
    n_layers = config.num_hidden_layers
    whole = n_tokens * activation_bytes(config, spread)
    kept = n_layers * (n_tokens * checkpoint_bytes(config) if checkpointing else whole)
    columns = -(-config.vocab_size // spread.tp_size)
    head_gradient = BF16 * columns * config.hidden_size
    # Reduced in fp32, from a copy of the gradients that come in bf16.
    backward = outer + head_gradient + 2 * layer + layer + layer * FP32 // BF16
    moments = [
        Memory(state, kept, outer, head_bytes(config, spread, n_tokens)),
        Memory(state, kept + checkpointing * whole, backward, 0),
        Memory(state, 0, 2 * outer + outer * FP32 // BF16, 0),
    ]
    return max(moments, key=lambda memory: memory.total)


# ------------------------------------------------------------------------------ communication


def fsdp_payload(
    config: PretrainedConfig, spread: Spread, dtype: int = BF16, *, micro_batches: int = 1
) -> dict[str, int]:
    """Of an update on a rank, by collective.

    Each micro-batch gathers the layers for its forward and again for its backward (whether that
    computes activations again or not), the root once; reduces and scatters all gradients in fp32.
    The last one also sums the shards of them over the replicas.
    """
    layers = config.num_hidden_layers * layer_bytes(config, spread, 1)
    outer = outer_bytes(config, spread, 1)
    shards = (layers + outer) // spread.fsdp_size
    return {
        "all_gather": micro_batches * dtype * (2 * layers + outer) * (spread.fsdp_size > 1),
        "reduce_scatter": micro_batches * FP32 * (layers + outer) * (spread.fsdp_size > 1),
        "all_reduce": FP32 * shards * (spread.ddp_size > 1),
    }


def sp_payload(
    config: PretrainedConfig,
    spread: Spread,
    n_tokens: int,
    dtype: int = BF16,
    *,
    checkpointing: bool = True,
) -> int:
    """All-to-alls of a micro-batch: query, key, value and output of each layer, forward and
    backward, and in the forward that checkpointing repeats.

    n_tokens: of a rank's slice.
    """
    if spread.sp_size == 1:
        return 0
    heads = config.num_attention_heads // spread.tp_size
    kv_heads = config.num_key_value_heads // spread.tp_size
    kv_heads *= kv_repeats(heads, kv_heads, spread.sp_size)
    once = dtype * n_tokens * config.head_dim * 2 * (heads + kv_heads)
    return config.num_hidden_layers * once * (2 + checkpointing)


def tp_payload(
    config: PretrainedConfig,
    spread: Spread,
    n_tokens: int,
    dtype: int = BF16,
    *,
    n_actions: int | None = None,
    checkpointing: bool = True,
) -> dict[str, int]:
    """Of a micro-batch on a rank, by collective.

    All-reduces of `[n_tokens, hidden]`: forward, the embedding and the outputs of attention and
    MLP (with checkpointing the first of the two again); backward, the gradients of the inputs of
    query, key, value, gate and up. At the head, in fp32, that of its `[n_actions, hidden]` (of
    actions without a gradient nothing), and six numbers for each action and rank, gathered.
    """
    if spread.tp_size == 1:
        return {"all_reduce": 0, "all_gather": 0}
    n_actions = n_tokens if n_actions is None else n_actions
    times = 1 + config.num_hidden_layers * (2 + checkpointing + 5)
    reduced = dtype * n_tokens * times + FP32 * n_actions
    return {
        "all_reduce": config.hidden_size * reduced,
        "all_gather": 6 * FP32 * n_actions * spread.tp_size,
    }


def sync_payload(config: PretrainedConfig, spread: Spread, dtype: int = BF16) -> dict[str, int]:
    """New weights for the engine, once a step: each parameter is gathered whole on every rank, in
    fp32, first over the tensor-parallel ranks and then over the others; and given to the engine in
    its dtype."""
    fsdp, tp = spread.fsdp_size, spread.tp_size

    def gathered(weight: Weight) -> int:
        of_tp = tp * weight.shard(spread) if tp > 1 and weight.cut is not None else 0
        return of_tp + weight.whole(spread) * (fsdp > 1)

    layer = sum(gathered(weight) for weight in layer_weights(config))
    outer = sum(gathered(weight) for weight in outer_weights(config))
    return {
        "all_gather": FP32 * (config.num_hidden_layers * layer + outer),
        "engine": dtype * n_parameters(config),
    }


TOKEN_FIELDS = {
    "states": 4, "actions": 4, "action_mask": 1, "loss_weights": 4, "advantages": 4,
    "llm_logps": 4,
}  # fmt: skip


def scatter_payload(spread: Spread, n_tokens: int, fields: dict[str, int] = TOKEN_FIELDS) -> int:
    """Bytes of a batch of n_tokens (without padding) on all ranks, once an update. Tensor-parallel
    ranks get the same ones."""
    return n_tokens * sum(fields.values()) * spread.tp_size


def sent(kind: str, payload: float, size: int) -> float:
    """Bytes that a rank sends over a ring of `size` ranks."""
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * payload * (size - 1) / size


# ------------------------------------------------------------------------------------- tables

_QWEN3 = {"vocab_size": 151936, "head_dim": 128}
MODELS: dict[str, PretrainedConfig] = {
    "Qwen3-4B": Qwen3Config(
        **_QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "Qwen3-32B": Qwen3Config(
        **_QWEN3, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        **_QWEN3, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
        num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, num_experts=128,
        num_experts_per_tok=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
SPREADS: dict[str, list[Spread]] = {
    "Qwen3-4B": [
        Spread(8), Spread(8, tp_size=2), Spread(64), Spread(64, ddp_size=8), Spread(64, sp_size=8),
        Spread(512, ddp_size=64), Spread(512, ddp_size=64, sp_size=8),
    ],
    "Qwen3-32B": [
        Spread(8), Spread(8, tp_size=8), Spread(64), Spread(64, ddp_size=8), Spread(64, tp_size=8),
        Spread(64, sp_size=8), Spread(512, ddp_size=64), Spread(512, ddp_size=8),
        Spread(512, ddp_size=8, sp_size=8),
    ],
    "Qwen3-235B-A22B": [
        Spread(8), Spread(64), Spread(64, sp_size=8), Spread(512), Spread(512, ddp_size=4),
        Spread(512, ddp_size=4, sp_size=8),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What seconds on paper assume: sustained arithmetic, and what a GPU sends a second to others
    of its machine and of other machines."""

    gpus: int = 8
    flops: float = 400e12
    inside: float = 300e9
    outside: float = 40e9

    def bandwidth(self, ranks: int) -> float:
        """Of a collective over groups that lie within `ranks` consecutive ranks."""
        return self.inside if ranks <= self.gpus else self.outside


def compute_seconds(
    config: PretrainedConfig, spread: Spread, n_tokens: int, machine: Machine, checkpointing: bool
) -> float:
    """Of a micro-batch: 6 operations a weight and token, 8 with checkpointing; attention is left
    out."""
    operations = (8 if checkpointing else 6) * n_parameters(config, active=True) * n_tokens
    return operations / spread.tp_size / machine.flops


def network_seconds(
    config: PretrainedConfig, spread: Spread, n_tokens: int, machine: Machine, checkpointing: bool
) -> dict[str, float]:
    """Of a micro-batch, by key, as if nothing went on meanwhile."""
    fsdp, tp, sp = spread.fsdp_size, spread.tp_size, spread.sp_size
    payload = fsdp_payload(config, spread)
    of_tp = tp_payload(config, spread, n_tokens, checkpointing=checkpointing)
    of_sp = sp_payload(config, spread, n_tokens, checkpointing=checkpointing)
    replicas = machine.bandwidth(spread.n_ranks)
    shards = machine.bandwidth(fsdp * tp)
    return {
        "fsdp": sum(sent(kind, payload[kind], fsdp) for kind in ("all_gather", "reduce_scatter"))
        / shards,
        "ddp": sent("all_reduce", payload["all_reduce"], spread.ddp_size) / replicas,
        "tp": sum(sent(kind, n, tp) for kind, n in of_tp.items()) / machine.bandwidth(tp),
        "sp": sent("all_to_all", of_sp, sp) / machine.bandwidth(sp * tp),
    }


def tables(n_tokens: int, machine: Machine = Machine(), checkpointing: bool = True) -> str:
    lines = []
    for name, config in MODELS.items():
        n, active = (n_parameters(config, active=active) / 1e9 for active in (False, True))
        lines += [
            f"### {name}: {n:.1f}B parameters, {active:.1f}B of them multiplied with a token", "",
            "| GPUs | ddp | sp | tp | sharded over | state | activations | in passing | head | "
            "**GiB** | compute | fsdp | ddp | tp | sp |",
            "|" + " ---: |" * 15,
        ]  # fmt: skip
        for spread in SPREADS[name]:
            memory = peak(config, spread, n_tokens, checkpointing=checkpointing)
            parts = (memory.state, memory.activations, memory.gathered, memory.head, memory.total)
            times = [
                compute_seconds(config, spread, n_tokens, machine, checkpointing),
                *network_seconds(config, spread, n_tokens, machine, checkpointing).values(),
            ]
            spreading = (
                spread.n_ranks, spread.ddp_size, spread.sp_size, spread.tp_size, spread.fsdp_size,
            )  # fmt: skip
            cells = [str(size) for size in spreading]
            cells += [f"{part / GIB:.1f}" for part in parts]
            cells += [f"{seconds:.2f}" if seconds else "–" for seconds in times]
            lines.append("| " + " | ".join(cells) + " |")
        sync = sync_payload(config, SPREADS[name][0])
        lines += [
            "",
            f"New weights for the engine, once a step: {sync['all_gather'] / GIB:.0f} GiB through "
            f"every rank (fp32), {sync['engine'] / GIB:.0f} GiB into every engine (bf16).",
            "",
        ]
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of one forward on a rank")
    parser.add_argument("--no-checkpointing", action="store_true")
    options = parser.parse_args()
    print(tables(options.tokens, checkpointing=not options.no_checkpointing))


if __name__ == "__main__":
    main()
