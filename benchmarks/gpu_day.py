"""Everything that a GPU has to show, in parts that each end within ten minutes.

    bash benchmarks/gpu_day.sh                  the parts that have no report yet, in turn
    bash benchmarks/gpu_day.sh head-4096 step   these, again
    bash benchmarks/gpu_day.sh --list           what there is, and what is done
    bash benchmarks/gpu_day.sh --device cpu     a rehearsal: the same calls on tiny shapes

Each part leaves `<out>/<part>.md`, in the form of benchmarks/RESULTS.md, and `<part>.log`. A part
that fails, or takes longer than `--limit` seconds, leaves only its log and is tried again next
time; the others go on. `<out>/report.md` holds all reports. The exit status is 1 where one failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_HEAD = "benchmarks/token_stats.py --device cuda --dtype bfloat16"
_UPDATE = "benchmarks/update.py"
_CHECK = "benchmarks/gpu_checks.py"
_QUICK = "--variants auto naive compile liger"

# What a part runs, by name, in the order of use: what is wrong is found before what is slow.
PARTS: dict[str, str] = {
    "machine": f"{_CHECK} machine",
    "tests": "-m pytest tests -m gpu -q -rN -p no:cacheprovider --ignore tests/real_engines",
    # dtype=auto with both attentions: loss and gradient norm beside each other
    "attention": f"{_UPDATE} --shape 0.6B --tokens 8192 --variants auto flash sdpa naive",
    "step": f"{_CHECK} step",
    "repeat": f"{_CHECK} repeat",
    "offload": f"{_CHECK} offload --shape 1.7B",
    "nccl": f"{_CHECK} nccl",
    # goal: 1.15 (gradients in forward) and 1.45 (recompute) times the three products
    "head-4096": f"{_HEAD} --tokens 8192 --hidden 4096",
    "head-2560": f"{_HEAD} --tokens 8576 --hidden 2560",
    # published anchor: Qwen3-0.6B, one H100, 16k: 11.9k tokens/s, MFU 11.1 %
    "update-0.6B": f"{_UPDATE} --shape 0.6B --tokens 8192 16384 {_QUICK}",
    "update-0.6B-heads": f"{_UPDATE} --shape 0.6B --tokens 16384 "
    "--variants tiled compiled triton triton_fused naive kept",
    "update-1.7B": f"{_UPDATE} --shape 1.7B --tokens 8192 16384 {_QUICK} --rounds 1",
    "update-4B-8k": f"{_UPDATE} --shape 4B --tokens 8192 {_QUICK} --rounds 1",
    "update-4B-16k": f"{_UPDATE} --shape 4B --tokens 16384 {_QUICK} --rounds 1",
}
# The same on a CPU in little time: other sizes for the same programs.
_TINY = "--device cpu --shape tiny"
REHEARSAL: dict[str, str] = {
    "machine": f"{_CHECK} machine --device cpu",
    "tests": PARTS["tests"],
    "attention": f"{_UPDATE} {_TINY} --tokens 512 --row 128 --rounds 1 --updates 1 "
    "--variants auto flash sdpa naive",
    **{
        name: f"{_CHECK} {name} {_TINY} --steps 2 --prompts 4 --responses 2 --prompt-length 8 "
        "--new-tokens 8"
        for name in ("step", "repeat", "offload", "nccl")
    },
    "head-4096": "benchmarks/token_stats.py --tokens 64 --hidden 64 --vocab 512 --dtype bfloat16 "
    "--cases logps_entropy --contestants floor naive recompute.tiled --rounds 1",
    "update-0.6B": f"{_UPDATE} {_TINY} --tokens 512 --row 128 --rounds 1 --updates 1 "
    "--variants auto naive",
}


def run_part(name: str, command: str, out: Path, limit: float) -> str:
    """Run a part; returns "done", or what became of it."""
    report, log = out / f"{name}.md", out / f"{name}.log"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    started = time.monotonic()
    # `timeout` ends what the part has started as well
    kill = ["timeout", "--kill-after=15", str(limit)]
    with log.open("w") as errors:
        done = subprocess.run(
            [*kill, sys.executable, *shlex.split(command)], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        errors.write(done.stdout)
    took = time.monotonic() - started
    if done.returncode in (124, 137):
        return f"longer than {limit:.0f} s; see {log}"
    if done.returncode == 5 and "pytest" in command:  # no test for this machine
        done.returncode = 0
    if done.returncode:
        return f"failed with {done.returncode}; see {log}"
    report.write_text(f"## {name}\n\n`python {command}` ({took:.0f} s)\n\n{done.stdout.strip()}\n")
    return "done"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_day")
    parser.add_argument("--limit", type=float, default=580.0, help="seconds of a part at most")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    parts = PARTS if options.device == "cuda" else REHEARSAL
    if unknown := [name for name in options.parts if name not in parts]:
        parser.error(f"{unknown[0]} is none of {', '.join(parts)}")
    options.out.mkdir(parents=True, exist_ok=True)
    reports = {name: options.out / f"{name}.md" for name in parts}
    if options.list:
        for name, command in parts.items():
            print(f"{'done' if reports[name].exists() else '    '}  {name:18} python {command}")
        return 0
    wanted = options.parts or [name for name in parts if not reports[name].exists()]
    states = {}
    for name in wanted:
        print(f"{name}: ", end="", flush=True)
        states[name] = run_part(name, parts[name], options.out, options.limit)
        print(states[name], flush=True)
    found = [path.read_text() for path in reports.values() if path.exists()]
    (options.out / "report.md").write_text("\n".join(found))
    print(f"reports: {options.out / 'report.md'}")
    return int(any(state != "done" for state in states.values()))


if __name__ == "__main__":
    raise SystemExit(main())
