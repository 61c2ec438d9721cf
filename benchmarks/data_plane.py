"""Seconds and bytes of what crosses ranks in a step, against pickled objects and a field at a time.

    python benchmarks/data_plane.py --ranks 4 --sequences 512 --tokens 8192
    python benchmarks/data_plane.py --lengths long-tail

Gloo processes on this machine; no model takes part. Three phases of a step:

- samples: the drivers' samples become the batch and the dump on rank 0;
- scatter: the fields that an update needs become packed micro-batches on every rank;
- gather: one log-probability per token comes back as a field of the batch.

The rival is what RL2 did before: samples pickled as lists of numbers, padded row by row on rank 0,
one collective for each field, a loop over the rows. Both give the same batch (checked). They run in
turns (A B A B …); printed are medians of the seconds until all ranks are done, of rank 0's seconds
on a core, and the bytes.
"""

from __future__ import annotations

import argparse
import math
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from RL2.datasets import collate  # noqa: E402
from RL2.distributed import Layout, ScatterPlan, gather, scatter  # noqa: E402
from RL2.distributed.traffic import Traffic  # noqa: E402
from RL2.rollout.sample_table import (  # noqa: E402
    SampleTable,
    _line,
    dump,
    gather_samples,
    to_batch,
)
from RL2.rollout.samples import NOT_THE_POLICY, Sample, Turn  # noqa: E402
from tests.ranks import run_on_ranks  # noqa: E402

N_RESPONSES = 8
FIELDS = (
    "states", "actions", "action_mask", "advantages", "llm_logps", "loss_weights", "old_logps",
    "ref_logps",
)  # fmt: skip
PHASES = ("samples", "scatter", "gather")


def draw_lengths(options: argparse.Namespace) -> list[int]:
    """Tokens of each sequence: all of them the limit, or log-normal with a few that reach it."""
    if options.lengths == "full":
        return [options.tokens] * options.sequences
    draw, median = random.Random(0), math.log(options.tokens / 5.5)
    drawn = [int(draw.lognormvariate(median, 0.8)) for _ in range(options.sequences)]
    return [min(options.tokens, max(options.tokens // 40 + 2, n)) for n in drawn]


def make_samples(lengths: list[int], numbers: range) -> list[Sample]:
    """One turn each: an eighth is prompt, the rest was written. Four characters to a token."""
    samples = []
    for i in numbers:
        n, n_prompt = lengths[i], max(1, lengths[i] // 8)
        n_written, draw = n - n_prompt, random.Random(i)
        text = "abc " * n_written
        sample = Sample(i // N_RESPONSES, i % N_RESPONSES, prompt="q" * n_prompt)
        reward = float(draw.random() < 0.5)
        sample.turns.append(Turn(sample.prompt, text, n_written, "stop", reward, reward))
        sample.sequences.append(
            {
                "token_ids": draw.choices(range(150_000), k=n),
                "action_mask": [False] * n_prompt + [True] * n_written,
                "llm_logps": [0.0] * n_prompt + [-draw.random() for _ in range(n_written)],
                "rewards": [0.0] * (n - 1) + [reward],
                "weight_versions": [NOT_THE_POLICY] * n_prompt + [3] * n_written,
            }
        )
        samples.append(sample)
    return samples


# ------------------------------------------------------------------------ as it is


def samples_now(own: list[Sample], folder: Path, traffic: Traffic) -> dict[str, Tensor] | None:
    table = SampleTable.of(own, lines=True)
    table = gather_samples(table, dist.get_world_size(), None, traffic)
    if table is None:
        return None
    table = table.sorted()
    dump(table, folder / "now.jsonl")
    return to_batch(table.good(), N_RESPONSES)


def scatter_now(batch: dict[str, Tensor] | None, max_length: int, traffic: Traffic):
    return scatter(batch, FIELDS, max_length, traffic=traffic)


# ------------------------------------------------------------------------ as it was


def samples_before(own: list[Sample], folder: Path, traffic: Traffic) -> dict[str, Tensor] | None:
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered, dst=0)
    if gathered is None:
        return None
    samples = [sample for rank_samples in gathered for sample in rank_samples]
    samples.sort(key=lambda sample: (sample.position, sample.response))
    with (folder / "before.jsonl").open("wb") as file:
        for sample in samples:
            file.write(_line(sample))
    rows = [(sample, sequence) for sample in samples for sequence in sample.sequences]
    versions = [torch.tensor(sequence["weight_versions"][1:]).long() for _, sequence in rows]
    batch = collate([{k: v for k, v in one.items() if k != "weight_versions"} for _, one in rows])
    return batch | {
        "sample_ids": torch.tensor([s.position * N_RESPONSES + s.response for s, _ in rows]),
        "group_ids": torch.tensor([s.position for s, _ in rows]),
        "rewards": batch["rewards"].double(),
        "correct": torch.tensor([s.reward > 0 for s, _ in rows]),
        "weight_versions": pad_sequence(versions, True, NOT_THE_POLICY),
    }


class PlanBefore:
    """The plan of `scatter_before`, made by the same packer."""

    def __init__(self, plan: ScatterPlan):
        n_ranks = plan.layout.dp_size
        self.lengths = plan.lengths.tolist()
        packs = [rows.tolist() for rows in plan.rows.split(plan.counts.tolist())]
        self.of_rank = [packs[r::n_ranks] for r in range(n_ranks)]
        self.sizes = [[self.size(pack) for pack in own] for own in self.of_rank]

    def size(self, pack: list[int]) -> int:
        return sum(self.lengths[row] for row in pack) or 1


def scatter_before(batch: dict[str, Tensor] | None, max_length: int, traffic: Traffic):
    n_ranks, own = dist.get_world_size(), dist.get_rank()
    box = [None]
    if own == 0:
        plan = ScatterPlan.make(batch["lengths"], max_length, Layout(world_size=n_ranks))
        box = [(PlanBefore(plan), {field: batch[field].dtype for field in FIELDS})]
        traffic.add("scatter", len(pickle.dumps(box[0])) * (n_ranks - 1))
    dist.broadcast_object_list(box, src=0)
    plan, dtypes = box[0]
    longest = max(map(sum, plan.sizes))

    def flatten(field: Tensor, rows: list[int]) -> Tensor:
        if not rows:
            return field.new_zeros(1)
        index = torch.tensor(rows)
        valid = torch.arange(field.shape[1]) < batch["lengths"][index, None]
        return field[index][valid]

    split = {}
    for field in FIELDS:
        shares = None
        if own == 0:
            flat = [torch.cat([flatten(batch[field], p) for p in packs]) for packs in plan.of_rank]
            shares = [torch.nn.functional.pad(one, (0, longest - len(one))) for one in flat]
        received = torch.empty(longest, dtype=dtypes[field])
        dist.scatter(received, shares, src=0)
        traffic.add("scatter", longest * received.itemsize * (n_ranks - 1))
        split[field] = received[: sum(plan.sizes[own])].split(plan.sizes[own])
    return [
        {field: parts[i] for field, parts in split.items()}
        | {"lengths": torch.tensor([plan.lengths[row] for row in pack] or [1])}
        for i, pack in enumerate(plan.of_rank[own])
    ], plan


def gather_before(values: list[Tensor], plan: PlanBefore, traffic: Traffic) -> Tensor | None:
    n_ranks = dist.get_world_size()
    flat, longest = torch.cat(values), max(map(sum, plan.sizes))
    flat = torch.nn.functional.pad(flat, (0, longest - len(flat)))
    shares = [torch.empty_like(flat) for _ in range(n_ranks)] if dist.get_rank() == 0 else None
    dist.gather(flat, shares, dst=0)
    traffic.add("gather", longest * flat.itemsize * (n_ranks - 1))
    if shares is None:
        return None
    out = flat.new_zeros(len(plan.lengths), max(plan.lengths))
    for share, packs in zip(shares, plan.of_rank, strict=True):
        offset = 0
        for pack in packs:
            start = offset
            for row in pack:
                length = plan.lengths[row]
                out[row, :length] = share[start : start + length]
                start += length
            offset += plan.size(pack)
    return out


# ------------------------------------------------------------------------ measuring


def timed(results: dict[str, list], phase: str, function: Callable, *args: Any) -> Any:
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    result = function(*args)
    busy = time.process_time() - busy
    dist.barrier()
    results.setdefault(phase, []).append((time.perf_counter() - start, busy))
    return result


def on_rank(options: argparse.Namespace, folder: Path) -> tuple[list[dict], list[dict]]:
    """Per contestant, {phase: [(seconds, seconds on a core) of each repeat]} and the bytes."""
    n_ranks, own = dist.get_world_size(), dist.get_rank()
    lengths = draw_lengths(options)
    per_rank = -(-len(lengths) // n_ranks)
    numbers = range(own * per_rank, min((own + 1) * per_rank, len(lengths)))
    samples = make_samples(lengths, numbers)
    pickled = [0] * n_ranks
    dist.all_gather_object(pickled, len(pickle.dumps(samples)))

    contestants = (
        (samples_before, scatter_before, gather_before),
        (samples_now, scatter_now, gather),
    )
    results: list[dict[str, list]] = [{}, {}]
    n_bytes: list[dict[str, float]] = [{}, {}]
    for repeat in range(-1, options.repeats):  # the first warms up
        outcomes = []
        for which, (to_rank_0, spread, back) in enumerate(contestants):
            traffic = Traffic()
            kept = results[which] if repeat >= 0 else {}
            batch = timed(kept, "samples", to_rank_0, samples, folder, traffic)
            if which == 0:  # gather_object pads to the largest
                traffic.add("samples", max(pickled) * (n_ranks - 1))
            if batch is not None:
                for i, name in enumerate(FIELDS):
                    if name not in batch:
                        batch[name] = torch.full(batch["states"].shape, float(i))
            micro_batches, plan = timed(kept, "scatter", spread, batch, options.max_length, traffic)
            values = [m["llm_logps"] for m in micro_batches]
            values = timed(kept, "gather", back, values, plan, traffic)
            n_bytes[which] = traffic.pop()
            outcomes.append((batch, values))
            del micro_batches
        if own == 0:
            check(*outcomes, folder)
        del outcomes, batch, values
    return results, n_bytes


def check(before: tuple, now: tuple, folder: Path) -> None:
    """Both contestants must have made the same of it."""
    (expected, expected_values), (batch, values) = before, now
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert torch.equal(values, expected_values)
    assert torch.equal(values, batch["llm_logps"][:, : values.shape[1]])
    assert (folder / "now.jsonl").read_bytes() == (folder / "before.jsonl").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="of the longest sequence")
    parser.add_argument("--lengths", choices=["full", "long-tail"], default="full")
    parser.add_argument("--max-length", type=int, help="of a pack; as the longest by default")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.max_length = options.max_length or options.tokens

    with tempfile.TemporaryDirectory() as folder:
        results, n_bytes = run_on_ranks(options.ranks, on_rank, options, Path(folder))[0]
    lengths = draw_lengths(options)
    print(
        f"{len(lengths)} sequences, {sum(lengths):,} tokens, {options.ranks} ranks, "
        f"median of {options.repeats}; before | now"
    )
    print(f"{'phase':>8} {'seconds':>17} {'ratio':>6} {'rank 0 busy, s':>17} {'MB':>17}")
    for phase in PHASES:
        wall, busy = (
            [statistics.median(one[i] for one in of[phase]) for of in results] for i in (0, 1)
        )
        mb = [of[f"comm/{phase}_bytes"] / 1e6 for of in n_bytes]
        print(
            f"{phase:>8} {wall[0]:>8.2f} {wall[1]:>8.2f} {wall[0] / wall[1]:>6.1f} "
            f"{busy[0]:>8.2f} {busy[1]:>8.2f} {mb[0]:>8.1f} {mb[1]:>8.1f}"
        )


if __name__ == "__main__":
    main()
