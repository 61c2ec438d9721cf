"""What else a GPU has to show, one check a call; each prints a report in the form of RESULTS.md.

    python benchmarks/gpu_checks.py machine      device, driver, versions
    python benchmarks/gpu_checks.py step         whole steps of spo with the embedded engine
    python benchmarks/gpu_checks.py offload      what offloading frees between updates
    python benchmarks/gpu_checks.py repeat       the same run twice: which metrics are bit-equal
    python benchmarks/gpu_checks.py nccl         two ranks, one of them killed with -9

`--device cpu --shape tiny` rehearses them where there is no GPU. A check that does not hold exits
with 1, one that cannot be made here says why and exits with 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import step, update  # noqa: E402

# All but how long things took: as tests/trainer/support.py has it.
MOODY = ("timing/", "memory/", "rollout/tokens_per_s")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "liger-kernel",
    "sglang",
    "vllm",
    "trl",
)


def machine(options: argparse.Namespace) -> None:
    lines = []
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} missing")
    print("Packages: " + ", ".join(lines) + ".")
    if options.device == "cuda":
        fields = "name,memory.total,driver_version"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def run_lines(folder: Path, save_dir: Path, options: argparse.Namespace, **changes) -> list[str]:
    """Overrides of a run of spo on the files that `write_files` left; a random model is hardly ever
    correct, so that all samples count."""
    lines = {
        "actor.device": options.device, "actor.gradient_checkpointing": "true",
        "actor.lr": 1e-5, "actor.avg_level": "sequence",
        "rollout.max_batch_size": 256, "trainer.save_dir": save_dir,
        "trainer.max_steps": options.steps, "trainer.num_threads": options.threads,
    } | changes  # fmt: skip
    return [*step.our_lines(folder, options), *(f"{key}={value}" for key, value in lines.items())]


def train(lines: list[str], n_processes: int = 1, **popen) -> subprocess.Popen:
    """A run as users start it."""
    start = [sys.executable, "-m"]
    if n_processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", "-m"]
    return subprocess.Popen(
        [*start, "RL2.trainer.spo", *lines], cwd=ROOT, stdin=subprocess.DEVNULL,
        env=os.environ | step.QUIET | {"PYTHONPATH": str(ROOT)}, **popen,
    )  # fmt: skip


def rows_of(save_dir: Path) -> list[dict]:
    path = save_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_files(folder: Path, options: argparse.Namespace) -> str:
    """Prompts, an environment and a model of the shape, its tokenizer included."""
    sizes = update.SHAPES[options.shape]
    options.vocab, options.hidden = sizes["vocab_size"], 64
    options.layers = 1
    step.write_files(folder, options)  # its tokenizer counts
    return f"{update.write_model(options.shape, folder / 'model', options.device) / 1e6:,.0f}M"


def steps(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_files(folder, options)
        done = train(run_lines(folder, folder / "run", options)).wait()
        rows = rows_of(folder / "run")
        if done or len(rows) != options.steps:
            raise SystemExit(f"the run ended with {done} after {len(rows)} steps; see above")
    taken = rows[1:] or rows  # the first one compiles
    named = ["timing/step", "timing/rollout", "timing/update_actor", "timing/update_rollout",
             "rollout/tokens_per_s", "rollout/llm_kl", "memory/peak_gib"]  # fmt: skip
    print(
        f"{options.steps} steps of `spo`, a Qwen3 of {size} parameters, "
        f"{options.prompts * options.responses} samples of {options.prompt_length} + "
        f"{options.new_tokens} tokens, embedded engine, {options.device}; medians of all but the "
        "first:\n"
    )
    print("| " + " | ".join(named) + " |\n|" + " ---: |" * len(named))
    cells = [f"{statistics.median(row[key] for row in taken):.4g}" for key in named]
    print("| " + " | ".join(cells) + " |")
    worst = max(row["rollout/llm_kl"] for row in rows)
    if worst > 0.01:
        raise SystemExit(f"rollout/llm_kl {worst:.4f}: engine and trainer are two policies")


def repeat(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        size = write_files(folder, options)
        for which in ("one", "two"):
            done = train(run_lines(folder, folder / which, options)).wait()
            found.append(rows_of(folder / which))
            if done or len(found[-1]) != options.steps:
                raise SystemExit(f"the run ended with {done}; see above")
    differing = {
        key
        for one, two in zip(*found, strict=True)
        for key in one.keys() | two.keys()
        if not key.startswith(MOODY) and one.get(key) != two.get(key)
    }
    compared = {key for row in found[0] for key in row if not key.startswith(MOODY)}
    print(
        f"The same run of `spo` twice ({size} parameters, {options.steps} steps, "
        f"{options.device}): {len(compared - differing)} of {len(compared)} metrics bit-equal"
        + (f"; not: {', '.join(sorted(differing))}." if differing else ".")
    )
    if differing and options.device == "cpu":  # promised there
        raise SystemExit(1)


def offload(options: argparse.Namespace) -> None:
    if options.device == "cpu":
        print("Offloading: needs CUDA, as everything is in CPU memory already.")
        return
    import torch

    from RL2.algorithms.token_loss import resolve_loss
    from RL2.distributed import process_group
    from RL2.workers import Actor

    changes = {"actor.offload_model": "true", "actor.offload_optimizer": "true"}
    with tempfile.TemporaryDirectory() as name, process_group("cuda") as device:
        update.write_model(options.shape, Path(name), "cuda")
        node, _ = update.actor_node(Path(name), 8192, "cuda", changes)
        batch = update.make_batch(8192, 2048, update.SHAPES[options.shape]["vocab_size"])
        actor = Actor(node, device, resolve_loss(node.loss))
        actor.prepare_scheduler(100)
        rows = []
        for _ in range(3):
            started = time.perf_counter()
            actor.update(batch, 1)
            torch.cuda.synchronize()
            trained = time.perf_counter()
            during = torch.cuda.memory_allocated()
            actor.offload()
            torch.cuda.synchronize()
            rows.append((during, torch.cuda.memory_allocated(), trained - started,
                         time.perf_counter() - trained))  # fmt: skip
    print(f"Offloading, Qwen3-{options.shape}, model and optimizer:\n")
    print("| update | GiB before | GiB after | s load and update | s offload |\n|" + " ---: |" * 5)
    for number, (during, after, updating, offloading) in enumerate(rows, start=1):
        print(
            f"| {number} | {during / 2**30:.2f} | {after / 2**30:.2f} | {updating:.2f} | "
            f"{offloading:.2f} |"
        )
    if any(after > during / 10 for during, after, *_ in rows):
        raise SystemExit("more than a tenth stayed on the GPU")


def nccl(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        import torch

        if torch.cuda.device_count() < 2:
            print("A killed rank with NCCL: needs two GPUs, and this machine has one.")
            return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, options)
        lines = run_lines(folder, folder / "run", options, **{"trainer.max_steps": 1000})
        run = train(lines, n_processes=2, start_new_session=True)
        try:
            wait_for(lambda: len(rows_of(folder / "run")) >= 2 or run.poll() is not None, 400)
            if run.poll() is not None:
                raise SystemExit(f"the run ended with {run.returncode} by itself")
            ranks = ranks_of(run.pid)
            os.kill(ranks[1], signal.SIGKILL)
            started = time.perf_counter()
            wait_for(lambda: run.poll() is not None, 150)
            took = time.perf_counter() - started
            wait_for(lambda: not any(Path("/proc", str(pid)).exists() for pid in ranks), 30)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    print(
        f"A rank of two killed with -9 ({options.device}): the run ended after {took:.1f} s with "
        f"status {run.returncode}; no process is left."
    )
    if run.returncode == 0:
        raise SystemExit("status 0 after a killed rank")


def ranks_of(launcher: int) -> list[int]:
    """Processes of the trainer below torchrun, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                one.split(b"=", 1)
                for one in (process / "environ").read_bytes().split(b"\0")
                if b"=" in one
            )
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile, or somebody else's
            continue
        if parent == launcher and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened within {seconds} s")
        time.sleep(0.2)


CHECKS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "machine": machine,
    "step": steps,
    "offload": offload,
    "repeat": repeat,
    "nccl": nccl,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=update.SHAPES, default="0.6B")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    CHECKS[options.check](options)


if __name__ == "__main__":
    main()
