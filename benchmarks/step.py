"""A whole RL step against TRL: rollout, statistics, update, weights to the engine.

    python benchmarks/step.py --trl-python <environment with trl>/bin/python
    python benchmarks/step.py --vocab 32768 --trl-python …
    python benchmarks/step.py --profile --sides rl2

Both sides train the same random Qwen3 on the same prompts with Dr. GRPO (no KL, no division by the
standard deviation, one update a rollout), AdamW in fp32 with the same rate, decay and clipping, on
CPU with the same number of threads and without gradient checkpointing. No token can end a response
(the end-of-sequence id lies beyond the vocabulary), so that both write exactly `--new-tokens` for
every response; the tokens are counted and must agree. The reward is the same function of the text.

- RL2: `Trainer.train` with the embedded engine, as `python -m RL2.trainer.ppo` runs it; its source
  waits for an order before each step.
- trl: `GRPOTrainer.train`, its callbacks wait for an order before each step. The whole batch is
  generated at once, and it generates with the model that it trains, so that it has no weights to
  copy. Its logging is off; ours is on.

Each side is a process of its own and the steps are taken in turns (A B A B …), after `--warmup` of
each; medians. `--sequences` are those in one forward and backward pass of the update; each number
is a contestant, and the fastest of either side is compared. Memory is the peak of the process
(VmHWM), before the first step and after the last.

`--profile` takes further steps of ours alone: a sampling profile of all threads by phase, and the
operators of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import Process, orders_and_answer, peak_gib  # noqa: E402

ENVIRONMENT = """
async def step(state, action, extra_info):
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
PHASES = ("rollout", "update_actor", "update_rollout")  # of our step, see docs/metrics.md

# --------------------------------------------------------------------------- what both work on


def write_files(folder: Path, options: argparse.Namespace) -> str:
    """Model, tokenizer, prompts and environment; returns the model's size in words."""
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
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
            dtype="float32",
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    words = {f"w{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])  # gets the id `vocab`
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="w0"
    ).save_pretrained(folder / "model")
    prompts = torch.randint(2, vocab, (options.prompts, options.prompt_length)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in ids)}) for ids in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "env.py").write_text(ENVIRONMENT)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


# ------------------------------------------------------------------------------------ our side


def our_lines(folder: Path, options: argparse.Namespace, **changes: Any) -> list[str]:
    """Overrides of `ppo` for one contestant; `changes` go by key, a dot written as `__`."""
    longest = options.prompt_length + options.new_tokens
    lines = {
        "actor.model_name": folder / "model", "actor.gradient_checkpointing": "false",
        "actor.max_length_per_device": options.prompts * options.responses * longest,
        "actor.lr": options.lr, "actor.warmup_ratio": 0.0, "actor.tis_coef": 0.0,
        "train_data.path": folder / "prompts.jsonl",
        "train_data.prompts_per_rollout": options.prompts,
        "train_data.responses_per_prompt": options.responses,
        "rollout.engine": "transformers", "rollout.env_path": folder / "env.py",
        "rollout.dynamic_filtering": "false", "rollout.max_batch_size": 2**20,
        "rollout.train_sampling_params.max_new_tokens": options.new_tokens,
        "trainer.n_epochs": 10**6, "trainer.use_wandb": "false", "trainer.dump_rollouts": "false",
        "trainer.num_threads": options.threads,
    }  # fmt: skip
    lines |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in lines.items()]


class Clock:
    """Seconds on the wall, and of this process's threads on CPUs, since it was made."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        cpu = time.process_time() - self._cpu
        return {"seconds": time.perf_counter() - self._wall, "cpu": cpu}


class OnOrder:
    """A trainer's source whose `collect`, the first thing in a step, waits for an order.

    Everything else is the source's own. When the next step is about to begin, `report` gets what
    the clock says of the last one, and the seconds that it had waited, which the trainer's timers
    count, too.
    """

    def __init__(self, source: Any, orders: Iterator[dict], report: Callable[..., None]):
        self._source, self._orders, self._report = source, orders, report
        self._waited, self._clock = 0.0, None

    def collect(self, step: int, last: bool = False) -> Any:
        if self._clock is not None:
            self._report(self._clock.read(), self._waited)
        waiting = Clock()
        if next(self._orders, None) is None:
            raise SystemExit
        self._waited = waiting.read()["seconds"]
        self._clock = Clock()
        return self._source.collect(step, last)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def profiled(orders: Iterator[dict]) -> Iterator[dict]:
    """The same orders; what happens between two is profiled where the first asks for it."""
    from torch.profiler import ProfilerActivity, profile
    from torch.profiler import _ExperimentalConfig as Config

    for order in orders:
        how = order.get("profile")
        if how == "python":
            with StackSampler() as sampler:
                yield order
            sys.stderr.write(sampler.table() + "\n")
        elif how == "operators":
            config = Config(profile_all_threads=True)
            with profile(
                activities=[ProfilerActivity.CPU], experimental_config=config
            ) as operators:
                yield order
            averages = operators.key_averages()
            sys.stderr.write(averages.table(sort_by="self_cpu_time_total", row_limit=20) + "\n")
        else:
            yield order


def serve_ours(lines: list[str], trainer_name: str = "ppo") -> None:
    """One rank of a run; the environment says which, as torchrun's does."""
    orders, answer = orders_and_answer()
    import torch
    from omegaconf import OmegaConf

    from RL2.config import apply_fallbacks, validate
    from RL2.distributed import process_group, rank
    from RL2.trainer.loop import Trainer
    from tests.trainer.support import composed, rows_of

    config = composed(trainer_name, lines)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    apply_fallbacks(config, cuda=False, available=set())
    OmegaConf.resolve(config)
    torch.set_num_threads(config.trainer.num_threads)

    if "data" in config:
        n_samples = config.data.batch_size
    else:
        n_samples = config.train_data.prompts_per_rollout * config.train_data.responses_per_prompt

    def report(took: dict[str, float], waited: float) -> None:
        told = took | {"peak_gib": peak_gib()}
        if rank() == 0:
            row = rows_of(Path(config.trainer.save_dir))[-1]
            phases = {k.removeprefix("timing/"): v for k, v in row.items() if "timing/" in k}
            phases["rollout"] -= waited
            told |= {"phases": phases, "tokens": row["train/avg_response_length"] * n_samples}
        answer(told)

    with process_group("cpu") as device:
        trainer = Trainer(config, device)
        trainer.source = OnOrder(trainer.source, profiled(orders), report)
        answer({"peak_gib": peak_gib()})
        try:
            trainer.train()
        finally:
            trainer.close()


# ---------------------------------------------------------------------------------------- TRL


def on_orders(
    orders: Iterator[dict], answer: Callable[[dict], None], told: Callable[[], dict] = dict
) -> Any:
    """A callback of transformers' trainer that waits for an order before each step, and answers
    with its seconds, the peak memory and what is `told`."""
    from transformers import TrainerCallback

    class OnOrders(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if next(orders, None) is None:
                raise SystemExit
            self.clock = Clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            answer(self.clock.read() | {"peak_gib": peak_gib()} | told())

    return OnOrders()


def serve_trl(folder: Path, options: argparse.Namespace, sequences: int) -> None:
    orders, answer = orders_and_answer()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    n_samples = options.prompts * options.responses
    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, seed=0,
        loss_type="dr_grpo", scale_rewards="none", beta=0.0, num_iterations=1, epsilon=0.2,
        num_generations=options.responses, max_completion_length=options.new_tokens,
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=n_samples // sequences,  # and so many generated at once
        temperature=1.0, top_p=1.0, top_k=0, gradient_checkpointing=False,
        optim="adamw_torch_fused", learning_rate=options.lr, weight_decay=0.01, max_grad_norm=1.0,
        lr_scheduler_type="constant", max_steps=10**6, save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    counted: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        counted.extend(map(len, completion_ids))
        return [float(sum(map(ord, text)) % 2) for text in completions]

    def told() -> dict:
        found = {"tokens": sum(counted), "phases": dict(phases)}
        counted.clear()
        phases.clear()
        return found

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config, processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        reward_funcs=reward, train_dataset=Dataset.from_list(rows),
        callbacks=[on_orders(orders, answer, told)],
    )  # fmt: skip
    phases: dict[str, float] = {}
    generate = trainer._generate_and_score_completions

    def timed(*arguments: Any) -> Any:
        clock = Clock()
        result = generate(*arguments)
        phases["rollout"] = clock.read()["seconds"]
        return result

    trainer._generate_and_score_completions = timed
    answer({"peak_gib": peak_gib()})
    trainer.train()


# ------------------------------------------------------------------------------------- profile


class StackSampler:
    """Where the threads of this process are, looked at a few hundred times a second.

    Counts seconds by phase (what the main thread is doing) and function: `inside` of everything on
    the stack of the thread that works, `own` of its innermost line.
    """

    _WAITS = ("threading.py", "selectors.py", "queue.py", "_base.py", "thread.py", "socket.py")
    _PHASES = {"collect": "rollout", "update": "update_actor", "publish": "update_rollout"}

    def __init__(self, interval: float = 0.004):
        self.interval = interval
        self.seconds: Counter[str] = Counter()
        self.inside: Counter[tuple[str, str]] = Counter()
        self.own: Counter[tuple[str, str]] = Counter()
        self._done = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> StackSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._done.wait(self.interval):
            now = time.perf_counter()
            self._look(now - last)
            last = now

    def _look(self, seconds: float) -> None:
        stacks = {
            ident: _stack(frame)
            for ident, frame in sys._current_frames().items()
            if ident != self._thread.ident
        }
        names = [name for _, name, _ in stacks[self._main]]
        steps = [names[i - 1] for i, name in enumerate(names) if name == "_step" and i]
        phase = self._PHASES.get(steps[0] if steps else "", "rest")
        self.seconds[phase] += seconds
        working = [stack for stack in stacks.values() if stack[0][0] not in self._WAITS]
        for stack in working[:1]:
            file, name, line = stack[0]
            self.own[phase, f"{file}:{line} {name}"] += seconds
            for where in {f"{file}:{name}" for file, name, _ in stack}:
                self.inside[phase, where] += seconds

    def table(self, rows: int = 25) -> str:
        lines = []
        for phase, total in self.seconds.most_common():
            lines.append(f"\n{phase}: {total:.2f} s\n{'inside of':>60} {'':>6}   own line")
            inside, own = (
                [(where, s) for (p, where), s in counter.most_common() if p == phase][:rows]
                for counter in (self.inside, self.own)
            )
            for i in range(max(len(inside), len(own))):
                left, right = (
                    f"{of[i][0][-58:]:>58} {of[i][1] / total:>6.1%}" if i < len(of) else " " * 65
                    for of in (inside, own)
                )
                lines.append(f"{left}   {right}")
        return "\n".join(lines)


def _stack(frame: Any) -> list[tuple[str, str, int]]:
    """(file, function, line), innermost first."""
    stack = []
    while frame is not None:
        code = frame.f_code
        stack.append((os.path.basename(code.co_filename), code.co_name, frame.f_lineno))
        frame = frame.f_back
    return stack


# ------------------------------------------------------------------------------------- compare


def start_ours(lines: list[str], threads: int, trainer: str = "ppo", **environment: str) -> Process:
    """One rank of our side; it answers once when it is ready."""
    ours = {"ours": lines, "trainer": trainer}
    command = [sys.executable, __file__, "--serve", json.dumps(ours)]
    return Process(command, **QUIET, OMP_NUM_THREADS=str(threads), **environment)


def contestants(folder: Path, options: argparse.Namespace) -> dict[str, Process]:
    longest = options.prompt_length + options.new_tokens
    started = {}
    for n in options.sequences if "rl2" in options.sides else ():
        save_dir = folder / f"RL2-{n}"
        lines = our_lines(
            folder, options, actor__max_length_per_device=n * longest, trainer__save_dir=save_dir
        )
        started[f"RL2, {n}"] = start_ours(lines, options.threads)
        started[f"RL2, {n}"].answer()
    for n in options.sequences if "trl" in options.sides else ():
        own = {"trl": str(folder), "sequences": n, "options": vars(options)}
        started[f"trl, {n}"] = Process(
            [options.trl_python, __file__, "--serve", json.dumps(own)],
            **QUIET, OMP_NUM_THREADS=str(options.threads), PYTHONPATH="", WANDB_MODE="disabled",
        )  # fmt: skip
        started[f"trl, {n}"].answer()
    return started


def compare(options: argparse.Namespace, folder: Path) -> None:
    size = write_files(folder, options)
    n_samples = options.prompts * options.responses
    expected = n_samples * options.new_tokens
    print(
        f"\n{size}, vocabulary {options.vocab}, {options.prompts} prompts of "
        f"{options.prompt_length} tokens x {options.responses} responses of {options.new_tokens}, "
        f"{options.threads} thread(s), {options.rounds} steps in turns, medians (lowest, highest)\n"
    )
    processes = contestants(folder, options)
    steps: dict[str, list[dict]] = {name: [] for name in processes}
    for round_ in range(options.warmup + options.rounds):
        for name, process in processes.items():
            answer = process.ask({"step": round_})
            if answer["tokens"] != expected:
                raise RuntimeError(f"{name} wrote {answer['tokens']} tokens, not {expected}")
            steps[name].append(answer)
    if options.profile:
        ours = fastest(steps, "RL2", options.warmup)
        for how in ("python", "operators"):
            processes[ours].ask({"profile": how})
    for process in processes.values():
        process.close()
    print_table({name: them[options.warmup :] for name, them in steps.items()}, n_samples)


def median_of(steps: list[dict], phase: str | None = None) -> float:
    """Median seconds of some steps, or of one of their phases; 0 where they have none such."""
    return statistics.median(
        step["seconds"] if phase is None else step["phases"].get(phase, 0.0) for step in steps
    )


def fastest(steps: dict[str, list[dict]], side: str, warmup: int = 0) -> str:
    names = [name for name in steps if name.startswith(side)]
    return min(names, key=lambda name: median_of(steps[name][warmup:]))


def print_table(steps: dict[str, list[dict]], n_samples: int) -> None:
    print(
        "| side, sequences per forward | s per step | rollout | update | weights | CPU s | "
        "samples/s | peak GiB |"
    )
    print("| --- |" + " ---: |" * 7)
    for name, them in steps.items():
        seconds = [step["seconds"] for step in them]
        rollout, update, sync = (median_of(them, phase) for phase in PHASES)
        if not update:  # TRL: all that is not rollout
            update = median_of(them) - rollout
        print(
            f"| {name} | {median_of(them):.2f} ({min(seconds):.2f}–{max(seconds):.2f}) | "
            f"{rollout:.2f} | {update:.2f} | {sync:.3f} | "
            f"{statistics.median(step['cpu'] for step in them):.2f} | "
            f"{n_samples / median_of(them):.1f} | {them[-1]['peak_gib']:.2f} |"
        )
    if len({name.split(",")[0] for name in steps}) < 2:
        return
    ours, theirs = fastest(steps, "RL2"), fastest(steps, "trl")
    ratios = [
        their["seconds"] / our["seconds"]
        for our, their in zip(steps[ours], steps[theirs], strict=True)
    ]
    print(
        f"\n{ours} makes {statistics.median(ratios):.2f} times the samples/s of {theirs} "
        f"({min(ratios):.2f}–{max(ratios):.2f} in single rounds)"
    )


def parser() -> argparse.ArgumentParser:
    """Options of both benchmarks that take steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--responses", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    return parser


def main() -> None:
    options = parser()
    options.add_argument("--sequences", type=int, nargs="+", default=[64, 16])
    options.add_argument("--sides", nargs="+", choices=["rl2", "trl"], default=["rl2", "trl"])
    options.add_argument("--trl-python", default=sys.executable)
    options.add_argument("--profile", action="store_true")
    options = options.parse_args()
    serve = options.serve or {}
    if "ours" in serve:
        serve_ours(serve["ours"], serve["trainer"])
    elif "trl" in serve:
        serve_trl(Path(serve["trl"]), argparse.Namespace(**serve["options"]), serve["sequences"])
    else:
        with tempfile.TemporaryDirectory(prefix="rl2-step-") as folder:
            compare(options, Path(folder))


if __name__ == "__main__":
    main()
