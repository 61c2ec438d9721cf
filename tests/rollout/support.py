"""Tiny models of three families, a byte-level tokenizer, and a look at other processes, for the
rollout tests."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from RL2.datasets.end_of_turn import end_tokens
from RL2.rollout.samples import action_parts

PAD, EOS, THINK_END = 0, 1, 2
VOCAB = 3 + 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..2 are <pad>, <eos> and </think>, the rest single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": PAD, "<eos>": EOS, "</think>": THINK_END}
    vocab |= {character: i for i, character in enumerate(alphabet, start=3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _config(family: str) -> PretrainedConfig:
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB, n_positions=256, n_embd=32, n_layer=2, n_head=2,
            initializer_range=0.3, bos_token_id=None, eos_token_id=EOS,
        )  # fmt: skip
    common = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    if family == "llama":
        return LlamaConfig(**common, tie_word_embeddings=False)
    return Qwen3Config(**common, head_dim=8, tie_word_embeddings=True)


def make_model(path: Path, family: str = "qwen3", seed: int = 0, **generation: object) -> str:
    """Save a random model, its generation config overridden by `generation`; returns the path."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(family))
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(path)
    return str(path)


def reference_logps(
    model: torch.nn.Module, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """Log-probabilities [n] of a response by one plain forward pass, without padding or cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].float()
    logits = logits[len(prompt) - 1 : -1] / (temperature or 1.0)
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def running(folder: Path) -> list[int]:
    """Processes whose command line names something in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()  # empty of one that has ended
        except OSError:
            continue
        if str(folder).encode() in command and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def action_text(completion, sampling, tokenizer, ends=None):
    """The text that an environment judges; ends: None is what the tokenizer alone says."""
    return action_parts(completion, sampling, tokenizer, ends or end_tokens(tokenizer))[0]
