"""What saving costs the training: in place, beside it, and with torch's own functions.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --ranks 1 --hidden 768 --layers 12

An actor on gloo ranks of this machine takes steps and saves, in turns (A B A B …) with:

- `RL2`: `Checkpoints`, as `trainer.async_save=false` does it;
- `RL2 beside`: the same in a thread, as `trainer.async_save=true` does it;
- `dcp.save` and `dcp.async_save`: torch's, on the same tensors. No manifest with checksums, nothing
  renamed when it is whole, no random states and data position.

Printed are medians over the rounds: the seconds that the training stands still for the save, those
until all is on disk, and those of the steps that follow at once, against the same steps without a
save. What stands still plus what the steps became longer by is what a save costs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from transformers import AutoModelForCausalLM, Qwen3Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from RL2.trainer.checkpoints.checkpoint import Checkpoints  # noqa: E402
from RL2.workers import Actor  # noqa: E402
from tests.ranks import run_on_ranks  # noqa: E402
from tests.workers.test_actor import as_spo, make_actor, make_batch  # noqa: E402

CONTESTANTS = ("RL2", "RL2 beside", "dcp.save", "dcp.async_save")
Save = Callable[[int], Callable[[], None]]  # begins to save a step; returns what waits for its end


def save_model(options: argparse.Namespace, folder: Path) -> int:
    """Write an untrained model; its number of parameters."""
    config = Qwen3Config(
        vocab_size=options.vocab, hidden_size=options.hidden, num_hidden_layers=options.layers,
        intermediate_size=3 * options.hidden, num_attention_heads=8, num_key_value_heads=4,
        head_dim=options.hidden // 8, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def savers(actor: Actor, folder: Path) -> dict[str, Save]:
    """By name of the contestant; each has a folder of its own."""

    def ours(name: str, background: bool) -> Save:
        checkpoints = Checkpoints(str(folder / name), keep_last=1, background=background)

        def save(step: int) -> Callable[[], None]:
            checkpoints.save(step, {"actor": actor}, {}, {})
            return checkpoints.wait

        return save

    def state() -> dict:
        model, optimizer = get_state_dict(actor.model, actor.optimizer)
        return {"model": model, "optimizer": optimizer}

    def torchs(step: int) -> Callable[[], None]:
        dcp.save(state(), checkpoint_id=folder / f"dcp{step}")
        return lambda: None

    group = dist.new_group(backend="gloo")

    def torchs_beside(step: int) -> Callable[[], None]:
        path = folder / f"async{step}"
        return dcp.async_save(state(), checkpoint_id=path, process_group=group).result

    every = (ours("sync", False), ours("beside", True), torchs, torchs_beside)
    return dict(zip(CONTESTANTS, every, strict=True))


def on_rank(options: argparse.Namespace, model: str, folder: Path) -> dict[str, list[tuple]]:
    """By contestant and "no save": (seconds still, until durable, of the steps) of each round."""
    torch.set_num_threads(options.threads)
    actor = make_actor(model, max_length_per_device=4096)
    batch = as_spo(make_batch(options.sequences)) if dist.get_rank() == 0 else None

    def steps() -> None:
        for _ in range(options.steps):
            actor.update(batch, 1)

    contestants: dict[str, Save] = {"no save": lambda step: lambda: None, **savers(actor, folder)}
    results: dict[str, list[tuple]] = {name: [] for name in contestants}
    for number in range(options.rounds + 1):  # the first warms up
        for name, save in contestants.items():
            steps()
            dist.barrier()
            begin = time.perf_counter()
            wait = save(number + 1)
            still = time.perf_counter() - begin
            steps()
            busy = time.perf_counter() - begin - still
            wait()
            durable = still if name in ("RL2", "dcp.save") else time.perf_counter() - begin
            dist.barrier()
            if number:
                results[name].append((still, durable, busy))
            if dist.get_rank() == 0:
                for old in [*folder.glob("dcp*"), *folder.glob("async*")]:
                    shutil.rmtree(old)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="that follow each save")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the file system to measure; default: temporary")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = save_model(options, folder / "model")
        by_rank = run_on_ranks(options.ranks, on_rank, options, str(folder / "model"), folder)
    rounds = by_rank[0]
    plain = statistics.median(busy for *_, busy in rounds["no save"])
    print(
        f"{size / 1e6:.1f}M parameters, {12 * size / 1e6:.0f} MB of state in float32, "
        f"{options.ranks} ranks with {options.threads} thread(s), {options.steps} steps after a "
        f"save ({plain:.2f} s without one), medians of {options.rounds} rounds\n"
    )
    print("| save by | stands still, s | on disk after, s | steps after, s | costs, s | of RL2's |")
    print("| --- |" + " ---: |" * 5)

    def row(name: str) -> tuple[float, float, float, float]:
        still, durable, busy = map(statistics.median, zip(*rounds[name], strict=True))
        return still, durable, busy, still + busy - plain

    for name in CONTESTANTS:
        cells = row(name)
        ratio = cells[-1] / row("RL2")[-1]
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {ratio:.2f} |")


if __name__ == "__main__":
    main()
