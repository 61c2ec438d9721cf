"""One update of an actor of a real size: tokens/s, share of the peak (MFU), peak memory.

    python benchmarks/update.py --shape 0.6B --tokens 8192 16384
    python benchmarks/update.py --shape 4B --tokens 8192 --variants auto naive compile --rounds 1
    python benchmarks/update.py --shape tiny --device cpu --tokens 512 --row 128

The model is a randomly initialised Qwen3 of the shape, stored in bf16; weights, gradients and
AdamW's moments are fp32, products bf16 (`actor.dtype=auto`), on one device. A batch is `--tokens`
tokens in rows of `--row`, each a prompt of an eighth of it and a response, in one forward and
backward pass; the loss is `max_target_kl` with `avg_level=correct` and every row correct, so that
every response token is learned. Rivals are variants of our own update:

- auto: what a run does where nobody sets a key; naive: whole logits (`actor.token_stats=naive`);
- tiled, compiled, triton, triton_fused: the other heads; compile: `actor.compile`;
- liger, flash, sdpa: liger's kernels, flash_attention_2, our attention; left out where the package
  is missing, which is said below the table;
- kept: activations kept in place of computed again (`actor.gradient_checkpointing=false`).

Each is a process of its own, and the list is gone through `--rounds` times; medians over all
updates after `--warmup`. Loss and gradient norm of the first update stand beside: they must agree.
MFU is 6 N T (N: all parameters) over the device's published bf16 peak; "with attention" adds
6 n² h d a layer and row of n tokens (h heads of d, causal).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import Process, orders_and_answer, peak_gib  # noqa: E402

_QWEN3 = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
          "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1e6}  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "0.6B": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "1.7B": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "4B": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    | {"num_attention_heads": 32},
    # SmolLM2-135M's
    "135M": _QWEN3
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "tiny": _QWEN3
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "naive": {"actor.token_stats": "naive"},
    "tiled": {"actor.token_stats": "tiled"},
    "compiled": {"actor.token_stats": "compiled"},
    "triton": {"actor.token_stats": "triton"},
    "triton_fused": {"actor.token_stats": "triton_fused"},
    "compile": {"actor.compile": "true"},
    "liger": {"actor.use_liger_kernel": "true"},
    "flash": {"actor.attn_implementation": "flash_attention_2"},
    "sdpa": {"actor.attn_implementation": "sdpa_varlen"},
    "kept": {"actor.gradient_checkpointing": "false"},
}
# bf16 without sparsity, from NVIDIA's data sheets; the first name that the device's holds.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def write_model(shape: str, folder: Path, device: str) -> int:
    """Its files, without a tokenizer; returns the number of its parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES[shape], tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_batch(n_tokens: int, row: int, vocab: int) -> dict:
    import torch

    n_rows, prompt = n_tokens // row, row // 8
    draw = torch.Generator().manual_seed(0)
    states = torch.randint(2, vocab, (n_rows, row), generator=draw)
    mask = torch.zeros(n_rows, row, dtype=torch.bool)
    mask[:, prompt:-1] = True  # the last token has no next one
    return {
        "states": states,
        "actions": states.roll(-1, 1) * mask,
        "action_mask": mask,
        "lengths": torch.full((n_rows,), row),
        "rewards": torch.zeros(n_rows, row),
        "advantages": mask.float(),
        "sample_ids": torch.arange(n_rows),
        "group_ids": torch.arange(n_rows),
        "correct": torch.ones(n_rows, dtype=torch.bool),
    }


def actor_node(folder: Path, n_tokens: int, device: str, changes: dict[str, Any]):
    """The `actor` node as a run resolves it, and what the run would have said."""
    from importlib.util import find_spec

    from omegaconf import OmegaConf

    from RL2.config import apply_fallbacks
    from tests.trainer.support import composed

    lines = {
        "train_data.path": "null", "train_data.prompts_per_rollout": 1, "actor.lr": 1e-6,
        "rollout.train_sampling_params.max_new_tokens": 8, "rollout.env_path": "env.py",
        "actor.model_name": folder, "actor.max_length_per_device": n_tokens,
        "actor.loss.name": "max_target_kl", "actor.avg_level": "correct", "actor.device": device,
        "actor.use_liger_kernel": "false", "actor.warmup_ratio": 0.0, "actor.tis_coef": 0.0,
    } | changes  # fmt: skip
    config = composed("ppo", [f"{key}={value}" for key, value in lines.items()])
    names = ("flash_attn", "liger_kernel", "triton")
    available = {name for name in names if find_spec(name)}
    said = apply_fallbacks(config, device == "cuda", available)
    OmegaConf.resolve(config)
    return config.actor, [line for line in said if line.startswith("actor.")]


def serve(told: dict[str, Any]) -> None:
    """A variant: one update for each order."""
    orders, answer = orders_and_answer()
    import torch

    from RL2.runtime.errors import RL2Error

    device_name, n_tokens = told["device"], told["tokens"]
    try:
        node, said = actor_node(Path(told["folder"]), n_tokens, device_name, told["changes"])
        if said:  # the variant would be another one
            answer({"skipped": said[0]})
        else:
            update_on_order(node, told, orders, answer)
    except RL2Error as error:
        answer({"skipped": str(error)})
    except torch.OutOfMemoryError:
        answer({"skipped": "out of memory"})


def update_on_order(
    node, told: dict[str, Any], orders: Iterator[dict], answer: Callable[[dict], None]
) -> None:
    import torch

    from RL2.algorithms.token_loss import resolve_loss
    from RL2.distributed import process_group
    from RL2.models.dtypes import resolve_attention
    from RL2.workers import Actor

    cuda = told["device"] == "cuda"
    batch = make_batch(told["tokens"], told["row"], told["vocab"])
    with process_group(told["device"]) as device:
        actor = Actor(node, device, resolve_loss(node.loss))
        actor.prepare_scheduler(10**6)
        facts = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "dtype": str(actor.dtypes.compute).removeprefix("torch."),
            "attention": resolve_attention(node.attn_implementation, actor.dtypes.compute),
            "head": actor.model.head.implementation if actor.model.head.linear else "whole logits",
        }
        for _ in orders:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            metrics = actor.update(batch, 1)
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else peak_gib()
            answer(
                facts
                | {"seconds": seconds, "peak_gib": peak}
                | {name: metrics[f"actor/{name}"] for name in ("loss", "grad_norm")}
            )


def flops(shape: str, n_parameters: int, n_tokens: int, row: int) -> tuple[float, float]:
    """Of an update: by 6 N T, and with causal attention added."""
    sizes = SHAPES[shape]
    products = 6.0 * n_parameters * n_tokens
    width = sizes["num_attention_heads"] * sizes["head_dim"]
    attention = 6.0 * sizes["num_hidden_layers"] * width * row**2 * (n_tokens // row)
    return products, products + attention


def take_turns(told: dict[str, dict], options: argparse.Namespace) -> dict[str, dict]:
    """Of each variant its answers to all timed updates, or why it was left out."""
    found: dict[str, dict] = {name: {"answers": [], "why": ""} for name in told}
    for _ in range(options.rounds):
        for name, order in told.items():
            if found[name]["why"]:
                continue
            process = Process(
                [sys.executable, __file__, "--serve", json.dumps(order)], HF_HUB_OFFLINE="1"
            )
            try:
                answers = []
                for _ in range(options.warmup + options.updates):
                    answers.append(process.ask({}))
                    if "skipped" in answers[-1]:
                        break
            except (RuntimeError, OSError) as error:
                found[name]["why"] = f"failed: {error}"
                continue
            finally:
                process.close()
            if "skipped" in answers[-1]:
                found[name]["why"] = answers[-1]["skipped"]
            else:
                found[name]["first"] = answers[0]
                found[name]["answers"] += answers[options.warmup :]
    return found


def table(found: dict[str, dict], shape: str, n_parameters: int, n_tokens: int, row: int) -> str:
    products, all_flops = flops(shape, n_parameters, n_tokens, row)
    taken = {name: one for name, one in found.items() if one["answers"]}
    times = {
        name: statistics.median(answer["seconds"] for answer in one["answers"])
        for name, one in taken.items()
    }
    lines = [
        "| variant | dtype, attention, head | s an update (range) | tokens/s | × naive | MFU | "
        "with attention | peak GiB | first loss | first norm |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in taken.items():
        first, answers, took = one["first"], one["answers"], times[name]
        peak = next((flop for card, flop in PEAKS.items() if card in first["device"]), None)
        shares = [f"{x / took / peak:.1%}" if peak else "–" for x in (products, all_flops)]
        span = [answer["seconds"] for answer in answers]
        cells = [
            name, f"{first['dtype']}, {first['attention']}, {first['head']}",
            f"{took:.3f} ({min(span):.3f}–{max(span):.3f})", f"{n_tokens / took:,.0f}",
            f"{times['naive'] / took:.2f}" if "naive" in times else "–", *shares,
            f"{max(answer['peak_gib'] for answer in answers):.2f}",
            f"{first['loss']:.5f}", f"{first['grad_norm']:.4f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {one['why']}" for name, one in found.items() if one["why"])]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options.add_argument("--shape", choices=SHAPES, default="0.6B")
    options.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    options.add_argument("--row", type=int, default=4096, help="tokens of a row")
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--updates", type=int, default=3, help="of each variant in a round")
    options.add_argument("--warmup", type=int, default=2, help="updates before those")
    return options


def main() -> None:
    options = parser().parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    if any(n_tokens % options.row for n_tokens in options.tokens):
        raise SystemExit(f"--tokens {options.tokens}: must be multiples of --row {options.row}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        n_parameters = write_model(options.shape, Path(folder), options.device)
        for n_tokens in options.tokens:
            told = {
                name: {
                    "folder": folder, "tokens": n_tokens, "row": options.row,
                    "vocab": SHAPES[options.shape]["vocab_size"], "device": options.device,
                    "changes": VARIANTS[name],
                }
                for name in options.variants
            }  # fmt: skip
            found = take_turns(told, options)
            print(
                f"Qwen3-{options.shape} ({n_parameters / 1e6:,.0f}M parameters), {n_tokens:,} "
                f"tokens in rows of {options.row:,}:\n\n"
                + table(found, options.shape, n_parameters, n_tokens, options.row),
                flush=True,
            )
            failed |= not any(one["answers"] for one in found.values())
    if failed:
        raise SystemExit("no variant could be measured")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
