"""The shared fixtures are what the other tests take them for."""

import json
import string

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_tokenizer_folder(tiny_tokenizer, tiny_tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    text = string.printable + "\N{GRINNING FACE} 世界"
    for one in (tiny_tokenizer, tokenizer):
        assert 100 <= len(one) <= 300
        assert one.decode(one(text)["input_ids"]) == text
        assert None not in (one.eos_token_id, one.pad_token_id, one.chat_template)
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_model_folder(tiny_model_dir, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert 50_000 < sum(p.numel() for p in model.parameters()) < 150_000
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == len(tiny_tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    logits = model(**tokenizer("1 + 1 =", return_tensors="pt")).logits
    assert logits.isfinite().all()


def test_rows_file(gsm8k_rows_file):
    with open(gsm8k_rows_file) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 32 and all("####" in row["answer"] for row in rows)
