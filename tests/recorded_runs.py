"""Short runs whose numbers a change of the code may not change: record them before it and after it.

    python -m tests.recorded_runs before              # in the tree as it was
    python -m tests.recorded_runs after               # in the tree as it is
    python -m tests.recorded_runs --compare before after

`record.json` of a folder holds, by run, the rows of metrics.jsonl without what depends on the
machine's mood (timings, memory), and the SHA-256 of the answers and of the weights in `final`.
Equal means equal to the last bit, so both records have to come from one machine and one set of
packages. Names after the folder record only those runs; `--list` names all. All of them take about
four minutes on two idle cores, most of it for `quickstart` and `vllm`, which is left out where its
environment is missing (`bash tests/real_engines/setup.sh vllm`).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.support import Run
from tests.real_engines.support import engine_run, make_engine_model
from tests.trainer.support import ROOT, command, environ, lasting, rows_of, write_env, write_files

NAME = "record.json"
_TURNS = """
async def step(state, action, extra_info):
    turn = extra_info.get("turn", 0) + 1
    good = float(sum(map(ord, action)) % 2)
    following = state + action + " and " if turn % 2 else "Anew: "
    return {"next_state": following, "reward": good, "score": good, "done": turn == 3,
            "extra_info": extra_info | {"turn": turn}}
"""
_GROUPS = {"train_data__prompts_per_rollout": 4, "train_data__responses_per_prompt": 4}
_KL = {**_GROUPS, "actor__kl__coef": 0.1, "actor__update_per_rollout": 2}
_LORA = {"actor__lora__rank": 4, "actor__lr": 1e-2}

RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "spo": ("spo", 1, {}),
    "spo correct": ("spo", 1, {"actor__avg_level": "correct"}),
    "spo_0p5": ("spo_0p5", 1, {}),
    "ppo": ("ppo", 1, _GROUPS),
    "ppo global norm": ("ppo", 1, {**_GROUPS, "adv__global_norm": "true", "adv__norm_var": "true"}),
    "sft": ("sft", 1, {}),
    "rank_jsd": ("spo", 1, {"actor__loss__name": "rank_jsd"}),
    "kl loss": ("ppo", 1, {**_KL, "actor__kl__type": "loss"}),
    "kl reward": ("ppo", 1, {**_KL, "actor__kl__type": "reward"}),
    "kl advantage": ("ppo", 1, {**_KL, "actor__kl__type": "advantage"}),
    "entropy": ("ppo", 1, {**_GROUPS, "actor__entropy__coef": 0.01}),
    "two updates": ("ppo", 1, {**_GROUPS, "actor__update_per_rollout": 2}),
    "small packs": ("ppo", 1, {**_GROUPS, "actor__max_length_per_device": 32}),
    "turns": ("ppo", 1, {**_GROUPS, "rollout__max_turns": 3, "rollout__env_path": "turns.py"}),
    "gspo": ("ppo", 2, {**_GROUPS, "actor__update_per_rollout": 2, "actor__sp_size": 2,
                        "actor__loss__name": "gspo"}),
    "lora": ("spo", 1, _LORA),
    "ddp 2": ("spo", 2, {"actor__ddp_size": 2}),
    "fsdp 2": ("ppo", 2, {**_GROUPS, "actor__update_per_rollout": 2}),
    "tp 2": ("spo", 2, {"actor__tp_size": 2}),
    "sp 2": ("spo", 2, {"actor__sp_size": 2}),
    "lora tp 2": ("spo", 2, {**_LORA, "actor__tp_size": 2}),
    "sft 2": ("sft", 2, {}),
    "staleness": ("spo", 1, {"rollout__staleness": 1}),
    "resampled": ("ppo", 1, {**_GROUPS, "rollout__max_resampled": 4}),
    "partial": ("ppo", 1, {**_GROUPS, "rollout__partial_rollout": "true"}),
    "evaluated": ("spo", 1, {"test_data__path": "rows.jsonl", "trainer__test_freq": 1,
                             "trainer__test_sampled": "true"}),
    "resumed": ("spo", 1, {"trainer__save_freq": 1, "actor__scheduler": "cosine"}),
    "resumed 2": ("ppo", 2, {**_GROUPS, "trainer__save_freq": 1}),
}  # fmt: skip
"""By name: the trainer, the number of ranks, and what differs from the tiny run of
`tests.trainer.support.overrides`; values that are files of its folder are given by their name. A
run called "resumed…" stops after two of its three steps, and goes on from its checkpoint."""


def _tiny(name: str, files: Path, folder: Path) -> None:
    trainer, n_ranks, changes = RUNS[name]
    changes = {
        key: files / value if (files / str(value)).is_file() else value
        for key, value in changes.items()
    } | {"trainer__max_steps": 3}
    if name.startswith("resumed"):
        first = changes | {"trainer__max_steps": 2}
        Run(files, trainer, folder, n_ranks, **first).finish()
        changes |= {"trainer__load_ckpt_from": "latest"}
    Run(files, trainer, folder, n_ranks, **changes).finish()


def _quickstart(files: Path, folder: Path) -> None:
    """The script as a user types it, with fewer steps of the three algorithms."""
    lines = ["trainer.max_steps=4", "trainer.test_freq=2", "trainer.num_threads=1"]
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(
            ["bash", "examples/quickstart.sh", "all", *lines],
            cwd=ROOT, env=environ(OUT=str(folder)), check=True, stdout=log, stderr=log,
        )  # fmt: skip


def _vllm(files: Path, folder: Path) -> None:
    folder.mkdir()
    model = make_engine_model(folder / "model")
    run = engine_run(
        "vllm", model, folder, train_data__path=files / "rows.jsonl", trainer__max_steps=2,
        train_data__responses_per_prompt=2, actor__gradient_checkpointing="false",
        rollout__train_sampling_params__max_new_tokens=8, trainer__num_threads=1,
        trainer__save_dir=folder,
    )  # fmt: skip
    done = command("ppo", run.lines, env=environ(**run.variables))
    if done.returncode:
        raise RuntimeError(done.stderr)


_WHOLE = {"quickstart": _quickstart, "vllm": _vllm}


def recorded(folder: Path) -> dict[str, Any]:
    """What is compared of a finished run."""
    return {
        "metrics": [lasting(row) for row in rows_of(folder)],
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in ("final/*.safetensors", "final/adapter/*.safetensors", "rollouts/*")
            for path in sorted(folder.glob(pattern))
        },
    }


def record(folder: Path, names: list[str]) -> dict[str, Any]:
    """Run them below `folder`, which has to be new; returns what was recorded, and writes it."""
    files = write_files(folder / "files")
    write_env(files / "turns.py", _TURNS)
    found = {}
    for name in names:
        print(name, file=sys.stderr)
        run = folder / name.replace(" ", "_")
        if name in _WHOLE:
            _WHOLE[name](files, run)
        else:
            _tiny(name, files, run)
        for metrics in sorted(run.rglob("metrics.jsonl")):
            inner = metrics.parent.relative_to(run).as_posix()
            found[name if inner == "." else f"{name} {inner}"] = recorded(metrics.parent)
    (folder / NAME).write_text(json.dumps(found, indent=1))
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each number or file of two records that is not the same in both."""
    lines = [f"{name}: only in one of the two" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        if len(one["metrics"]) != len(other["metrics"]):
            lines.append(f"{name}: {len(one['metrics'])} rows, then {len(other['metrics'])}")
        for old, new in zip(one["metrics"], other["metrics"], strict=False):
            lines += [
                f"{name}: step {old['step']} {key} {old.get(key)}, then {new.get(key)}"
                for key in {**old, **new}
                if old.get(key) != new.get(key)
            ]
        lines += [
            f"{name}: {path} is not the same"
            for path in {**one["files"], **other["files"]}
            if one["files"].get(path) != other["files"].get(path)
        ]
    return sorted(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("names", nargs="*", help="runs to record; all where none is given")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    everything = [*RUNS, *_WHOLE]
    if arguments.list:
        print("\n".join(everything))
    elif arguments.compare:
        lines = differences(
            *(json.loads((folder / NAME).read_text()) for folder in arguments.compare)
        )
        print("\n".join(lines) or "equal to the last bit")
        sys.exit(bool(lines))
    elif arguments.folder is None or (wrong := set(arguments.names) - set(everything)):
        parser.error(f"give a folder, and names of {everything}" if arguments.folder is None
                     else f"{sorted(wrong)} not among {everything}")  # fmt: skip
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        arguments.folder.mkdir(parents=True)
        names = arguments.names or everything
        if "vllm" not in arguments.names and not (ROOT / ".venv-vllm").exists():
            print("vllm: left out, as there is no .venv-vllm", file=sys.stderr)
            names = [name for name in names if name != "vllm"]
        record(arguments.folder.resolve(), names)


if __name__ == "__main__":
    main()
