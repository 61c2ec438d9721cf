"""Steps of SFT, DPO and reward models against TRL's trainers.

    python benchmarks/trainers.py --methods sft --trl-python <environment with trl>/bin/python
    python benchmarks/trainers.py --methods dpo rm --vocab 32768 --trl-python …
    python benchmarks/trainers.py --methods dpo --profile --sides rl2

Both sides train the same random Qwen3 on the same rows, all of them in each step, with fused AdamW
in fp32 on CPU, the same rate and clipping, one thread each, no gradient checkpointing. Lengths are
drawn evenly from `--prompt-length` and `--response-length`. Data is tokenised before the first
step.

- RL2: `python -m RL2.trainer.sft`, `dpo` or `rm`, see `benchmarks/step.py`. Its source waits for an
  order before each step. Rows are packed, up to `--tokens` of them in a forward and backward pass.
- trl: `SFTTrainer`, `DPOTrainer` or `RewardTrainer`, whose batches are padded to their longest row.
  `--rows` are those of one pass (pairs for DPO and reward models); each number is a contestant. For
  DPO, `ref once` has `precompute_ref_log_probs`, as ours always computes them once.

Each side is a process of its own, and the steps are taken in turns (A B A B …) after `--warmup` of
each. The fastest contestants of both sides are compared, by CPU seconds: they do not depend on what
else the machine does, wall seconds do. Memory is the peak of the process (VmHWM), before the first
step and after the last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import Process, orders_and_answer, peak_gib  # noqa: E402
from benchmarks.step import QUIET, on_orders, start_ours  # noqa: E402

METHODS = ("sft", "dpo", "rm")


def write_files(folder: Path, options: argparse.Namespace) -> str:
    """Model, tokenizer and rows; returns the model's size in words."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocab, hidden = options.vocab, options.hidden
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden,
            num_hidden_layers=options.layers, num_attention_heads=hidden // 32,
            num_key_value_heads=max(1, hidden // 64), head_dim=32, max_position_embeddings=4096,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1,
            dtype="float32",
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    words = ["<end>", "<pad>", *(f"w{i}" for i in range(2, vocab))]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(vocab), strict=True)), "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:2]])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder / "model")

    generator = random.Random(0)

    def text(lengths: list[int]) -> str:
        return "".join(
            " " + word for word in generator.choices(words[2:], k=generator.randint(*lengths))
        )

    def write(name: str, keys: tuple[str, ...]) -> None:
        rows = [
            {"prompt": text(options.prompt_length)}
            | {key: text(options.response_length) for key in keys}
            for _ in range(options.batch)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("sft.jsonl", ("response",))
    write("pairs.jsonl", ("chosen", "rejected"))
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


def rows_file(method: str) -> str:
    return "sft.jsonl" if method == "sft" else "pairs.jsonl"


def our_lines(folder: Path, options: argparse.Namespace, method: str, tokens: int) -> list[str]:
    """Overrides of a trainer of ours."""
    lines = {
        "actor.model_name": folder / "model", "actor.gradient_checkpointing": "false",
        "actor.max_length_per_device": tokens, "actor.lr": options.lr, "actor.warmup_ratio": 0.0,
        "actor.scheduler": "constant", "data.path": folder / rows_file(method),
        "data.max_length": longest(options), "data.batch_size": options.batch,
        "trainer.n_epochs": 10**6, "trainer.use_wandb": "false",
        "trainer.save_dir": folder / f"ours-{method}-{tokens}",
        "trainer.num_threads": options.threads,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in lines.items()]


def longest(options: argparse.Namespace) -> int:
    return options.prompt_length[1] + options.response_length[1] + 8


def serve_trl(
    folder: Path, options: argparse.Namespace, method: str, rows: int, ref_once: bool
) -> None:
    orders, answer = orders_and_answer()
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    torch.set_num_threads(options.threads)
    make_config, make_trainer, auto_class, own = {
        "sft": (trl.SFTConfig, trl.SFTTrainer, AutoModelForCausalLM, {}),
        "dpo": (
            trl.DPOConfig, trl.DPOTrainer, AutoModelForCausalLM,
            {"precompute_ref_log_probs": ref_once},
        ),
        "rm": (trl.RewardConfig, trl.RewardTrainer, AutoModelForSequenceClassification, {}),
    }[method]  # fmt: skip
    config = make_config(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, seed=0,
        per_device_train_batch_size=rows, gradient_accumulation_steps=options.batch // rows,
        max_length=longest(options), gradient_checkpointing=False, optim="adamw_torch_fused",
        learning_rate=options.lr, weight_decay=0.01, max_grad_norm=1.0,
        lr_scheduler_type="constant", max_steps=10**6, save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, **own,
    )  # fmt: skip
    found = map(json.loads, (folder / rows_file(method)).read_text().splitlines())
    names = {"response": "completion"}
    texts = [{names.get(key, key): value for key, value in row.items()} for row in found]
    labels = {"num_labels": 1} if method == "rm" else {}
    trainer = make_trainer(
        model=auto_class.from_pretrained(folder / "model", dtype=torch.float32, **labels),
        args=config, processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        train_dataset=Dataset.from_list(texts), callbacks=[on_orders(orders, answer)],
    )  # fmt: skip
    answer({"peak_gib": peak_gib()})
    trainer.train()


def contestants(folder: Path, options: argparse.Namespace, method: str) -> dict[str, Process]:
    started = {}
    for tokens in options.tokens if "rl2" in options.sides else ():
        lines = our_lines(folder, options, method, tokens)
        started[f"RL2, {tokens:,} tokens"] = start_ours(
            [*lines, *options.own], options.threads, method
        )
    for rows in options.rows if "trl" in options.sides else ():
        for ref_once in (False, True) if method == "dpo" else (False,):
            own = {
                "folder": str(folder), "rows": rows, "ref_once": ref_once, "method": method,
                "options": vars(options),
            }  # fmt: skip
            name = f"TRL, {rows} rows" + ", ref once" * ref_once
            started[name] = Process(
                [options.trl_python, __file__, "--serve", json.dumps(own)],
                **QUIET, OMP_NUM_THREADS=str(options.threads), PYTHONPATH="", WANDB_MODE="disabled",
            )  # fmt: skip
    for process in started.values():
        process.answer()
    return started


def measure(folder: Path, options: argparse.Namespace, method: str) -> dict[str, list[dict]]:
    processes = contestants(folder, options, method)
    steps: dict[str, list[dict]] = {name: [] for name in processes}
    for round_ in range(options.warmup + options.rounds):
        for name, process in processes.items():
            steps[name].append(process.ask({"step": round_}))
    if options.profile:
        ours = min((name for name in steps if name.startswith("RL2")), key=lambda n: cpu(steps[n]))
        for how in ("python", "operators"):
            processes[ours].ask({"profile": how})
    for process in processes.values():
        process.close()
    return {name: them[options.warmup :] for name, them in steps.items()}


def cpu(steps: list[dict]) -> float:
    return statistics.median(step["cpu"] for step in steps)


def print_table(steps: dict[str, list[dict]], method: str, n_rows: int) -> None:
    """n_rows: of a step, or pairs."""
    print(f"\n| {method} | CPU s per step | s | samples per CPU s | peak GiB |")
    print("| --- |" + " ---: |" * 4)
    for name, them in steps.items():
        seconds = [step["cpu"] for step in them]
        wall = statistics.median(step["seconds"] for step in them)
        print(
            f"| {name} | {cpu(them):.3f} ({min(seconds):.3f}–{max(seconds):.3f}) | {wall:.3f} | "
            f"{n_rows / cpu(them):.1f} | {them[-1]['peak_gib']:.2f} |"
        )
    ours = [name for name in steps if name.startswith("RL2")]
    best = min(ours, key=lambda name: cpu(steps[name]), default=None)
    kinds = {name: name.endswith("ref once") for name in steps if name not in ours}
    for ref_once in sorted({*kinds.values()} if ours else ()):
        them = [name for name, kind in kinds.items() if kind == ref_once]
        their = min(them, key=lambda name: cpu(steps[name]))
        ratios = [b["cpu"] / a["cpu"] for a, b in zip(steps[best], steps[their], strict=True)]
        print(
            f"\n{best}: {statistics.median(ratios):.2f} times the samples of {their} "
            f"({min(ratios):.2f}–{max(ratios):.2f} in single rounds)"
        )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="rows or pairs of a step")
    parser.add_argument("--prompt-length", type=int, nargs=2, default=[32, 96])
    parser.add_argument("--response-length", type=int, nargs=2, default=[32, 160])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="ours, a pass")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 4], help="TRL's, a pass")
    parser.add_argument("--own", nargs="+", default=[], help="further overrides of ours")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=["rl2", "trl"], default=["rl2", "trl"])
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--profile", action="store_true", help="ours, after the rounds")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.serve is not None:
        own: dict[str, Any] = options.serve
        serve_trl(
            Path(own["folder"]), argparse.Namespace(**own["options"]), own["method"], own["rows"],
            own["ref_once"],
        )  # fmt: skip
        return
    with tempfile.TemporaryDirectory(prefix="rl2-trainers-") as folder:
        size = write_files(Path(folder), options)
        print(
            f"\n{size}, vocabulary {options.vocab}, {options.batch} rows or pairs a step, prompts "
            f"of {options.prompt_length} and responses of {options.response_length} tokens, "
            f"{options.threads} thread(s), {options.rounds} steps in turns, medians (lowest, "
            "highest)"
        )
        for method in options.methods:
            steps = measure(Path(folder), options, method)
            print_table(steps, method, options.batch)


if __name__ == "__main__":
    main()
