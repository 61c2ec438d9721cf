"""Tokens per second of the in-process engine against transformers' continuous batching.

Both run the same random Qwen3 (0.8M parameters by default) on the same prompts, one after the
other in turns (A B A B …), and the medians are printed:

- equal: no end-of-sequence token, every response has the same length;
- long-tailed: some ids end a response, so that lengths are geometric up to the limit.

    python benchmarks/rollout_engine.py --threads 1 2 --requests 64 256

Each number of threads runs in a process of its own, as OpenMP reads it at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

VOCAB = 300
MEAN_LENGTH = 50  # of the long-tailed responses


def build_model(folder: str, hidden: int, layers: int) -> str:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=hidden // 4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


def padded(folder: str, eos_ids: list[int], max_new_tokens: int) -> Callable:
    """The library's engine; returns run(prompts, seed) -> number of tokens."""
    from types import SimpleNamespace

    from RL2.engines.protocol import SamplingParams
    from RL2.engines.transformers.engine import TransformersEngine

    tokenizer = SimpleNamespace(
        pad_token_id=0, eos_token_id=None, bos_token_id=None, unk_token_id=None,
        all_special_ids=[], added_tokens_decoder={}, chat_template=None,
    )  # fmt: skip
    engine = TransformersEngine(folder, tokenizer=tokenizer)
    engine.decoder.eos_ids = tuple(eos_ids)
    engine.decoder.model.generation_config.eos_token_id = eos_ids or None
    sampling = SamplingParams(1.0, max_new_tokens)

    async def complete(prompts: list[list[int]], seed: int) -> int:
        requests = [
            engine.generate(prompt, sampling, seed=seed * len(prompts) + i)
            for i, prompt in enumerate(prompts)
        ]
        return sum(len(completion.token_ids) for completion in await asyncio.gather(*requests))

    return lambda prompts, seed: asyncio.run(complete(prompts, seed))


def continuous(folder: str, eos_ids: list[int], max_new_tokens: int) -> Callable:
    """transformers' ContinuousBatchingManager; returns run(prompts, seed) -> number of tokens."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=eos_ids or -1, pad_token_id=0,
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=256, num_blocks=128, max_batch_tokens=1024, return_logprobs=True,
        ),
    )  # fmt: skip
    manager.start()

    def run(prompts: list[list[int]], seed: int) -> int:
        manager.add_requests(prompts, max_new_tokens=max_new_tokens)
        tokens = 0
        for _ in prompts:
            result = manager.get_result(timeout=600)
            if result is None or result.error:
                raise RuntimeError(f"continuous batching failed: {result}")
            tokens += len(result.generated_tokens)
        return tokens

    run.stop = lambda: manager.stop(block=True)
    return run


def compare(options: argparse.Namespace) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        size = build_model(folder, options.hidden, options.layers)
        print(f"\n{size}, {threads} thread(s), median of {options.repeats}, tokens/s")
        print(f"{'lengths':>12} {'requests':>8} {'padded':>8} {'continuous':>10} {'ratio':>6}")
        for name, eos_ids, limit in (
            ("equal", [], options.equal_length),
            ("long-tailed", list(range(1, 1 + VOCAB // MEAN_LENGTH)), options.max_new_tokens),
        ):
            engines = [make(folder, eos_ids, limit) for make in (padded, continuous)]
            for n in options.requests:
                draw = random.Random(0)
                prompts = [
                    [draw.randrange(10, VOCAB) for _ in range(draw.randrange(20, 60))]
                    for _ in range(n)
                ]
                speeds: list[list[float]] = [[], []]
                for repeat in range(-1, options.repeats):  # the first warms up
                    for engine, kept in zip(engines, speeds, strict=True):
                        start = time.perf_counter()
                        tokens = engine(prompts, repeat + 1)
                        if repeat >= 0:
                            kept.append(tokens / (time.perf_counter() - start))
                a, b = map(statistics.median, speeds)
                print(f"{name:>12} {n:>8} {a:>8.0f} {b:>10.0f} {a / b:>6.2f}", flush=True)
            engines[1].stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--equal-length", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of long-tailed responses")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    if len(options.threads) == 1 and os.environ.get("OMP_NUM_THREADS") == str(options.threads[0]):
        compare(options)
        return
    for threads in options.threads:
        arguments = [a for a in sys.argv[1:]] + ["--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True)


if __name__ == "__main__":
    main()
