"""Rollout engines side by side: tokens per second, weight updates, and what the collector costs.

    python benchmarks/rollout.py --engines transformers vllm sglang trl \
        --vllm-python .venv-vllm/bin/python --sglang-python .venv-sglang/bin/python \
        --trl-python <environment with trl>/bin/python
    python benchmarks/rollout.py --measure sync --engines vllm sglang
    python benchmarks/rollout.py --measure collector --engines vllm sglang

Three measurements (`--measure`), each in turns (A B A B …) with medians at the end:

- throughput: tokens per second at 64 and at 512 requests, all of them asked for at once. Prompts of
  8 to 64 tokens, responses that end with a probability of 1/64 per token, 256 tokens at most.
  `trl` is what GRPOTrainer of TRL generates with, without a server.
- sync: seconds per GiB for new weights, from the trainer's tensors to the servers' answer that they
  hold them, the comparison of checksums included.
- collector: the same requests through the collector (environment, batch, dump), against the engine
  alone; above 95 % is the aim.

Contestants that do not run stand still (SIGSTOP), as an idle server may keep a core busy.
SGLang on a CPU without AMX needs a stand-in for its kernels:
PYTHONPATH=tests/real_engines/sglang_stand_in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import Process  # noqa: E402

EOS = list(range(4, 8))
VOCAB = 256  # of which four ids end a response
LONGEST = 256
ENVIRONMENT = """
async def step(state, action, extra_info):
    good = float(len(action) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""


def build_model(folder: Path, hidden: int, layers: int, vocab: int = VOCAB + 3) -> str:
    """A random Qwen3 that ends a response with probability 4/256 or so, and a byte tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.rollout.support import make_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64), head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        dtype="float32",
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


def make_prompts(n: int) -> list[list[int]]:
    generator = random.Random(0)
    return [
        [generator.randrange(8, VOCAB) for _ in range(generator.randint(8, 64))] for _ in range(n)
    ]


class OurEngine:
    """One of the library's engines, started; stopped (SIGSTOP) while others run."""

    def __init__(self, name: str, folder: Path, work: Path, python: str | None, **changes):
        import torch
        from omegaconf import OmegaConf

        from RL2.config import apply_fallbacks, validate
        from RL2.engines.registry import build_engine
        from RL2.runtime.event_loop import EventLoopThread
        from tests.rollout.support import make_tokenizer
        from tests.trainer.support import composed

        (work / "env.py").write_text(ENVIRONMENT)
        lines = {
            "train_data.path": "null", "train_data.prompts_per_rollout": 8,
            "actor.model_name": folder, "actor.max_length_per_device": 512,
            "rollout.train_sampling_params.max_new_tokens": LONGEST,
            "rollout.env_path": work / "env.py", "rollout.engine": name,
            "rollout.dynamic_filtering": "false", "rollout.request_timeout": 1800.0,
            "trainer.save_dir": work / name,
        }  # fmt: skip
        if python:
            lines["rollout.server_python"] = python
        lines |= {key.replace("__", "."): value for key, value in changes.items()}
        self.config = composed("ppo", [f"{key}={value}" for key, value in lines.items()])
        validate(self.config, 1)
        apply_fallbacks(self.config, cuda=torch.cuda.is_available(), available={"sglang", "vllm"})
        OmegaConf.resolve(self.config)
        self.tokenizer = make_tokenizer()
        self.name, self.loop = name, EventLoopThread()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = build_engine(self.config, self.tokenizer, device)

    def start(self) -> OurEngine:
        self.loop.run(self.engine.start())
        return self

    def pids(self) -> list[int]:
        """Of its servers; none for the embedded engine."""
        from RL2.runtime.process_tree import descendants

        pool = getattr(self.engine, "_pool", None)
        guards = [member.process.pid for member in pool.members] if pool else []
        return [pid for guard in guards for pid in [guard, *descendants(guard)]]

    def freeze(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGCONT)

    def generate(self, prompts: list[list[int]], seed: int) -> tuple[int, float]:
        """Tokens written and seconds."""
        from RL2.engines.protocol import SamplingParams

        sampling = SamplingParams(1.0, LONGEST)

        async def all_of_them():
            return await asyncio.gather(
                *(
                    self.engine.generate(prompt, sampling, seed=seed * len(prompts) + i)
                    for i, prompt in enumerate(prompts)
                )
            )

        start = time.perf_counter()
        completions = self.loop.run(all_of_them())
        return sum(len(c.token_ids) for c in completions), time.perf_counter() - start

    def close(self) -> None:
        self.thaw()
        self.loop.run(self.engine.close())
        self.loop.close()


TRL = """
import json, sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
folder, longest, eos, work = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
args = GRPOConfig(output_dir=work, max_completion_length=longest, num_generations=2,
    per_device_train_batch_size=2, temperature=1.0, top_p=1.0, top_k=0, report_to=[],
    use_cpu=not torch.cuda.is_available(), bf16=False,
    generation_kwargs={"eos_token_id": eos})
trainer = GRPOTrainer(model=model, args=args, processing_class=tokenizer,
    reward_funcs=lambda completions, **_: [0.0] * len(completions),
    train_dataset=Dataset.from_list([{"prompt": "a"}] * 8))
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    torch.manual_seed(order["seed"])
    start = time.perf_counter()
    answer = trainer._generate_single_turn(order["prompts"], None, {}, 1)
    seconds = time.perf_counter() - start
    # Padding after the end is cut off by the trainer; what is left was written.
    print(json.dumps({"tokens": sum(map(len, answer[0])), "seconds": seconds}), flush=True)
"""


class TRLGeneration:
    """`GRPOTrainer._generate_single_turn` in a process of its own."""

    name = "trl"

    def __init__(self, folder: Path, work: Path, python: str):
        self.process = Process(
            [python, "-c", TRL, str(folder), str(LONGEST), json.dumps(EOS), str(work / "trl")],
            PYTHONPATH="", WANDB_MODE="disabled",
        )  # fmt: skip
        self.process.answer()

    def generate(self, prompts: list[list[int]], seed: int) -> tuple[int, float]:
        answer = self.process.ask({"prompts": prompts, "seed": seed})
        return answer["tokens"], answer["seconds"]

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def close(self) -> None:
        self.process.close()


def pythons(options: argparse.Namespace) -> dict[str, str | None]:
    return {
        "transformers": None, "vllm": options.vllm_python, "sglang": options.sglang_python,
        "trl": options.trl_python,
    }  # fmt: skip


def throughput(options: argparse.Namespace, work: Path) -> None:
    folder = work / "model"
    size = build_model(folder, options.hidden, options.layers)
    contestants = []
    for name in options.engines:
        python = pythons(options)[name]
        if name == "trl":
            contestants.append(TRLGeneration(folder, work, python))
        else:
            contestants.append(OurEngine(name, folder, work, python).start())
        contestants[-1].freeze()
    print(f"\n{size}, {options.rounds} rounds in turns, medians of tokens/s (lowest, highest)\n")
    print("| requests | " + " | ".join(c.name for c in contestants) + " |")
    print("| ---: |" + " ---: |" * len(contestants))
    for n in options.requests:
        prompts, rates = make_prompts(n), {c.name: [] for c in contestants}
        for round_ in range(options.rounds + 1):  # the first warms up
            for contestant in contestants:
                contestant.thaw()
                tokens, seconds = contestant.generate(prompts, seed=round_)
                contestant.freeze()
                rates[contestant.name].append(tokens / seconds)
        cells = [
            f"{statistics.median(r[1:]):,.0f} ({min(r[1:]):,.0f}–{max(r[1:]):,.0f})"
            for r in rates.values()
        ]
        print(f"| {n} | " + " | ".join(cells) + " |", flush=True)
    for contestant in contestants:
        contestant.close()


def sync(options: argparse.Namespace, work: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = work / "model"
    size = build_model(folder, options.sync_hidden, 8, vocab=32_000)
    model = AutoModelForCausalLM.from_pretrained(folder)
    gib = sum(p.nbytes for p in model.parameters()) / 2**30
    print(f"\n{size}, {gib:.2f} GiB in fp32, {options.rounds} updates each, medians\n")
    print("| engine | method | s/GiB | lowest | highest |\n| --- | --- | ---: | ---: | ---: |")
    for name in options.engines:
        methods = ["-"] if name == "transformers" else ["tensor", "distributed", "disk"]
        for method in methods:
            changes = {} if method == "-" else {"rollout__weight_sync": method}
            python = pythons(options)[name]
            contestant = OurEngine(name, folder, work, python, **changes).start()
            seconds = []
            for version in range(options.rounds + 1):
                start = time.perf_counter()
                update = contestant.engine.update_weights(model.named_parameters(), version)
                contestant.loop.run(update)
                seconds.append((time.perf_counter() - start) / gib)
            contestant.close()
            rest = seconds[1:]
            print(
                f"| {name} | {method} | {statistics.median(rest):.2f} | {min(rest):.2f} | "
                f"{max(rest):.2f} |", flush=True,
            )  # fmt: skip


def collector(options: argparse.Namespace, work: Path) -> None:
    from RL2.rollout import Collector
    from RL2.rollout.samples import stable_seed

    folder = work / "model"
    size = build_model(folder, options.hidden, options.layers)
    print(f"\n{size}, {options.rounds} rounds in turns\n")
    print("| engine | requests | engine alone, tokens/s | through the collector | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in options.engines:
        contestant = OurEngine(name, folder, work, pythons(options)[name])
        own = Collector(
            contestant.config.rollout, contestant.tokenizer, contestant.engine, seed=0,
            rollouts_dir=work / "rollouts", progress=False,
        )  # fmt: skip
        contestant.loop = own._loop  # an engine belongs to one event loop
        for n in options.requests:
            prompts, rates = make_prompts(n), {"alone": [], "collector": []}
            items = [{"prompt": "x", "prompt_ids": p, "extra_info": {}} for p in prompts]
            for round_ in range(options.rounds + 1):
                tokens, seconds = contestant.generate(prompts, seed=stable_seed(1, round_))
                rates["alone"].append(tokens / seconds)
                start = time.perf_counter()
                batch, _ = own.collect(items, step=round_, train=True)
                seconds = time.perf_counter() - start
                rates["collector"].append(batch["action_mask"].sum().item() / seconds)
            alone, through = (statistics.median(r[1:]) for r in rates.values())
            print(
                f"| {name} | {n} | {alone:,.0f} | {through:,.0f} | "
                f"{through / alone:.3f} |", flush=True,
            )  # fmt: skip
        own.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", default="throughput", choices=sorted(MEASUREMENTS))
    parser.add_argument("--engines", nargs="+", default=["transformers"])
    parser.add_argument("--requests", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sync-hidden", type=int, default=1024)
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python")
    parser.add_argument("--sglang-python", default=".venv-sglang/bin/python")
    parser.add_argument("--trl-python", default=sys.executable)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rl2-rollout-") as work:
        MEASUREMENTS[options.measure](options, Path(work))


MEASUREMENTS = {"throughput": throughput, "sync": sync, "collector": collector}

if __name__ == "__main__":
    main()
