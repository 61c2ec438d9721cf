"""How even packs are, and what packing is worth in tokens per second.

    python benchmarks/packing.py --measure balance
    python benchmarks/packing.py --measure speed

balance: cost of the bins of `plan_packs`, against first-fit decreasing and against what RL2 did
before (LPT or MULTIFIT over tokens, largest bins first, dealt to the ranks in runs). A row of l
tokens costs l + quadratic * l**2; 3.4e-5 is attention's part in a model of 1.7B parameters. Three
ratios, 1 is the best: `bin`, the dearest bin over the mean one; `rank`, the rank with the most work
over the mean one; `time`, the sum over micro-batches of the dearest bin that runs at the same time,
over that of even bins: how much longer a step takes as ranks wait for each other. `least` bounds
`bin` from below, as a row is not split.

speed: forward and backward of a small model on gloo ranks that wait for each other after each
micro-batch, as they do in sharded training. Packed; one row per forward; and batches of rows padded
to the longest, as many as fit. In turns (A B A B …), medians.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from RL2.distributed import Layout, scatter  # noqa: E402
from RL2.ops import plan_packs  # noqa: E402
from tests.ranks import run_on_ranks  # noqa: E402

Bins = list[list[int]]


def long_tail(n_rows: int, longest: int, sigma: float) -> list[int]:
    """Log-normal lengths, median 1,500 of 8,192, some of which reach the limit."""
    draw, scale = random.Random(0), longest / 8192
    drawn = [int(scale * draw.lognormvariate(math.log(1500), sigma)) for _ in range(n_rows)]
    return [min(longest, max(int(200 * scale), n)) for n in drawn]


# ------------------------------------------------------------------------ balance


def first_fit(lengths: list[int], capacity: int) -> Bins:
    """First-fit decreasing."""
    bins, free = [], []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        index = next((i for i, room in enumerate(free) if room >= lengths[row]), len(bins))
        if index == len(bins):
            bins.append([])
            free.append(capacity)
        bins[index].append(row)
        free[index] -= lengths[row]
    return bins


def least_loaded(lengths: list[int], n_bins: int) -> Bins:
    bins, loads = [[] for _ in range(n_bins)], [0] * n_bins
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        index = loads.index(min(loads))
        bins[index].append(row)
        loads[index] += lengths[row]
    return bins


def multifit(lengths: list[int], n_bins: int, max_length: int) -> Bins:
    low, high = max(-(-sum(lengths) // n_bins), max(lengths)), max_length
    while low < high:
        middle = (low + high) // 2
        if len(first_fit(lengths, middle)) <= n_bins:
            high = middle
        else:
            low = middle + 1
    return first_fit(lengths, high)


def by_first_fit(lengths: list[int], max_length: int, n_ranks: int, _: float) -> list[Bins]:
    """The bins of each rank, in the order in which they run; dealt one by one."""
    bins = first_fit(lengths, max_length)
    bins += [[] for _ in range(-len(bins) % n_ranks)]
    return [bins[rank::n_ranks] for rank in range(n_ranks)]


def before(lengths: list[int], max_length: int, n_ranks: int, _: float) -> list[Bins]:
    n_bins = -(-len(first_fit(lengths, max_length)) // n_ranks) * n_ranks
    plans = least_loaded(lengths, n_bins), multifit(lengths, n_bins, max_length)
    bins = min(plans, key=lambda bins: max(sum(lengths[row] for row in rows) for rows in bins))
    bins += [[] for _ in range(n_bins - len(bins))]
    bins.sort(key=lambda rows: -sum(lengths[row] for row in rows))
    run = n_bins // n_ranks
    return [bins[start : start + run] for start in range(0, n_bins, run)]


def now(lengths: list[int], max_length: int, n_ranks: int, quadratic: float) -> list[Bins]:
    bins = plan_packs(lengths, max_length, n_ranks, quadratic)
    return [bins[rank::n_ranks] for rank in range(n_ranks)]


def unevenness(costs: list[float], of_ranks: list[Bins]) -> tuple[float, float, float]:
    loads = [[sum(costs[row] for row in rows) for rows in bins] for bins in of_ranks]
    n_bins, even = len(loads) * len(loads[0]), sum(costs) / len(loads)
    return (
        max(map(max, loads)) * n_bins / sum(costs),
        max(map(sum, loads)) / even,
        sum(map(max, zip(*loads, strict=True))) / even,
    )


def compare_balance(options: argparse.Namespace) -> None:
    plans = {"first fit": by_first_fit, "before": before, "now": now}
    print(
        f"{'sigma':>5} {'pack':>6} {'ranks':>5} {'quadratic':>9} {'bins':>5} {'least':>5}"
        + "".join(f" | {name + ': bin rank time':>23}" for name in plans)
    )
    for sigma in options.sigma:
        lengths = long_tail(options.rows, 8192, sigma)
        for max_length in options.max_length:
            for n_ranks in options.ranks:
                for quadratic in options.quadratic:
                    costs = [n + quadratic * n**2 for n in lengths]
                    made = [f(lengths, max_length, n_ranks, quadratic) for f in plans.values()]
                    n_bins = n_ranks * len(made[-1][0])
                    least = max(1.0, max(costs) * n_bins / sum(costs))
                    line = f"{sigma:>5} {max_length:>6} {n_ranks:>5} {quadratic:>9} {n_bins:>5}"
                    for one in made:
                        ratios = " ".join(f"{ratio:>7.3f}" for ratio in unevenness(costs, one))
                        line += (f" {least:>5.2f}" if one is made[0] else "") + f" | {ratios}"
                    print(line)


# ------------------------------------------------------------------------ speed


def build_model(options: argparse.Namespace) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3Config

    from RL2.models.headed_model import HeadedModel
    from RL2.models.heads import TokenStatsHead
    from RL2.ops.attention import register_attention

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=options.hidden // 4, max_position_embeddings=options.tokens,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention())
    return HeadedModel(model, TokenStatsHead(model, {}))


def make_batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    states = torch.randint(1, 1024, valid.shape, generator=torch.Generator().manual_seed(0))
    return {
        "states": states * valid,
        "actions": states.roll(-1, 1) * valid,
        "action_mask": valid,
        "lengths": torch.tensor(lengths),
    }


def padded(batch: dict[str, torch.Tensor], n_rows: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of `n_rows` rows in their order, padded to the longest of them; the ranks
    take turns."""
    n_ranks, own = dist.get_world_size(), dist.get_rank()
    micro_batches = []
    for start in range(own * n_rows, len(batch["lengths"]), n_rows * n_ranks):
        rows = slice(start, start + n_rows)
        longest = int(batch["lengths"][rows].max())
        fields = {
            name: batch[name][rows, :longest] for name in ("states", "actions", "action_mask")
        }
        lengths = torch.full((len(fields["states"]),), longest)
        micro_batches.append(
            {name: field.flatten() for name, field in fields.items()} | {"lengths": lengths}
        )
    return micro_batches


def on_rank(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each repeat, per contestant."""
    lengths = long_tail(options.rows, options.tokens, 0.8)
    batch = make_batch(lengths)
    model = build_model(options)
    fields = ("states", "actions", "action_mask")
    layout = Layout(world_size=dist.get_world_size())
    contestants = {
        "packed": lambda: scatter(batch, fields, options.tokens, layout)[0],
        "one row": lambda: padded(batch, 1),
        "padded": lambda: padded(batch, max(1, options.tokens // max(lengths))),
        "padded x4": lambda: padded(batch, 4 * max(1, options.tokens // max(lengths))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(-1, options.repeats):  # the first warms up
        for name, make in contestants.items():
            dist.barrier()
            start = time.perf_counter()
            for one in make():
                positions = one["action_mask"].nonzero().squeeze(1)
                actions = one["actions"][positions]
                stats = model(one["states"], one["lengths"], positions, actions, 1.0, ("logps",))
                stats["logps"].sum().backward()
                dist.barrier()
            model.zero_grad()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare_speed(options: argparse.Namespace) -> None:
    n_tokens = sum(long_tail(options.rows, options.tokens, 0.8))
    print(
        f"{options.rows} rows, {n_tokens:,} tokens, at most {options.tokens} in a row or pack, "
        f"{options.speed_ranks} ranks, median of {options.repeats}"
    )
    seconds = run_on_ranks(options.speed_ranks, on_rank, options)[0]
    fastest = statistics.median(seconds["packed"])
    print(f"{'':>10} {'tokens/s':>9} {'packed is':>10}")
    for name, them in seconds.items():
        median = statistics.median(them)
        print(f"{name:>10} {n_tokens / median:>9.0f} {median / fastest:>9.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", nargs="+", default=["balance", "speed"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.8, 1.0])
    parser.add_argument("--max-length", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 64])
    parser.add_argument("--quadratic", type=float, nargs="+", default=[0.0, 3.4e-5])
    parser.add_argument("--speed-ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="limit of rows and packs in speed")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if "balance" in options.measure:
        compare_balance(options)
    if "speed" in options.measure:
        compare_speed(options)


if __name__ == "__main__":
    main()
