"""Write what the quickstart trains on: word problems, a tokenizer and a tiny untrained model.

    python examples/word_problems.py --out runs/quickstart --seed 0

makes, under `--out`:

    data/warmup.jsonl    problems with worked answers, for supervised warm-up
    data/train.jsonl     other problems, for rollouts
    data/test.jsonl      1,024 problems that occur in neither
    base/                a Qwen3 of about 1M parameters with random weights, and its tokenizer

Rows have GSM8K's form: `question`, a worked `answer`, and the number after `####`. Everything
follows from the seed. Left out: distractors, units, fractions; a problem has two steps.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana Ian Joy Kim Leo Mia Noa Omar Pia".split()
ITEMS = "apples books cards coins eggs kites marbles pens shells stamps".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def problem(rng: random.Random) -> dict[str, str]:
    """One problem of two steps, each a gain, a loss or a multiplication."""
    name, friend = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    total = rng.randint(2, 20)
    question, work = [f"{name} has {total} {items}."], []
    for _ in range(2):
        kind = rng.choice(("gain", "gain", "loss", "loss", "times"))
        if kind == "times" and total <= 30:
            factor = rng.randint(2, 3)
            question.append(f"Then {name} gets {factor} times as many.")
            work.append(f"{total} * {factor} = {total * factor}")
            total *= factor
        elif kind == "loss" and total >= 5:
            amount = rng.randint(2, min(total - 1, 20))
            question.append(f"{name} gives {amount} {items} to {friend}.")
            work.append(f"{total} - {amount} = {total - amount}")
            total -= amount
        else:
            amount = rng.randint(2, 20)
            question.append(f"{friend} gives {name} {amount} {items} more.")
            work.append(f"{total} + {amount} = {total + amount}")
            total += amount
    question.append(f"How many {items} does {name} have now?")
    return {"question": " ".join(question), "answer": "\n".join([*work, f"#### {total}"])}


def distinct_problems(rng: random.Random) -> Iterator[dict[str, str]]:
    seen = set()
    while True:
        row = problem(rng)
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row


def build_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the numbers of the problems become tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, seed: int):
    """An untrained Qwen3 of the given width and depth."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=16384, help="rows for the warm-up")
    parser.add_argument("--train", type=int, default=32768, help="rows for rollouts")
    parser.add_argument("--test", type=int, default=1024, help="rows for evaluation")
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()

    problems = distinct_problems(random.Random(args.seed))
    splits = {
        name: [next(problems) for _ in range(getattr(args, name))]
        for name in ("warmup", "train", "test")
    }
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with (data / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    # The instruction that RL2 adds to a question is among the texts, so that it costs few tokens.
    from RL2.datasets.prompts import GSM8K_INSTRUCTION

    texts = [f"{row['question']} {GSM8K_INSTRUCTION}\n{row['answer']}" for row in splits["warmup"]]
    tokenizer = build_tokenizer(texts, args.vocab)
    model = build_model(tokenizer, args.width, args.layers, args.seed)
    tokenizer.save_pretrained(args.out / "base")
    model.save_pretrained(args.out / "base")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {data} and {args.out / 'base'} ({size / 1e6:.2f}M parameters)")


if __name__ == "__main__":
    main()
