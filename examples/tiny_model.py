"""Build a tokenizer and a tiny untrained Qwen3 for the texts of a data set.

    python examples/tiny_model.py --data warmup.jsonl --out base --vocab 512 --width 128 --layers 4

`--data` takes what `data.path` of `RL2.trainer.sft` takes, with rows in GSM8K's form. The tokenizer
is a byte-level BPE trained on the prompts as RL2 renders them (so that the chat template and the
instruction, which are in every prompt, take few tokens) and on the worked answers. Both are written
to one folder for `actor.model_name`. The result depends only on the data and the seed.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

from RL2.datasets import Rows, load_rows
from RL2.datasets.prompts import question_prompt, text_of
from RL2.datasets.rows import BadRow
from RL2.runtime.errors import RL2Error

PAD, END = "<|pad|>", "<|end|>"
SPECIAL = [PAD, END, "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
N_HEADS = 4
BYTES = pre_tokenizers.ByteLevel.alphabet()


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer for transformers, with its special tokens and chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE
    )


def training_texts(rows: Rows) -> Iterator[str]:
    """Prompts as RL2 renders them, cut at special tokens (which are never merged), and answers."""
    untrained = wrap(Tokenizer(models.BPE()))
    special = re.compile("|".join(map(re.escape, SPECIAL)))

    def texts_of(row: dict[str, Any]) -> list[str]:
        if lacking := {"question", "answer"} - row.keys():
            raise BadRow(f"row without {' and '.join(sorted(lacking))}")
        prompt = question_prompt(untrained, text_of(row, "question"))
        return [*special.split(prompt), text_of(row, "answer")]

    return chain.from_iterable(rows.parsed(texts_of, "data"))


def build_tokenizer(rows: Rows, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens; frequent numbers become tokens of their own.

    Any text goes through it without loss, also one that has no byte in common with `rows`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(rows), trainer)
    return wrap(tokenizer)


def build_model(
    tokenizer: PreTrainedTokenizerFast, width: int, layers: int, seed: int
) -> PreTrainedModel:
    """A Qwen3 with random weights. width: size of the hidden states, a multiple of 8."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS // 2,
        head_dim=width // N_HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return AutoModelForCausalLM.from_config(config)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="rows with question and answer")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer and model")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--vocab", type=int, default=512, help="tokens of the vocabulary at most")
    parser.add_argument("--width", type=int, default=128, help="of the hidden states")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    smallest = len(BYTES) + len(SPECIAL)
    if args.vocab < smallest:
        parser.error(f"--vocab {args.vocab}: bytes and special tokens alone are {smallest}")
    if args.width < 1 or args.width % (2 * N_HEADS):
        parser.error(f"--width {args.width}: must be a multiple of {2 * N_HEADS}")
    if args.layers < 1:
        parser.error(f"--layers {args.layers}: must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    disable_progress_bar()  # for saving, which takes no time
    try:
        tokenizer = build_tokenizer(load_rows(args.data, "data"), args.vocab)
    except RL2Error as error:
        sys.exit(f"tiny_model: {error}")
    model = build_model(tokenizer, args.width, args.layers, args.seed)
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    print(
        f"wrote {args.out}: {model.num_parameters() / 1e6:.2f}M parameters, "
        f"{len(tokenizer)} tokens, {args.layers} layers of width {args.width}"
    )


if __name__ == "__main__":
    main()
