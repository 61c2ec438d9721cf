"""The tiny model of the examples: a folder that transformers loads, with a lossless tokenizer."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.datasets.prompts import GSM8K_INSTRUCTION, question_prompt

ROOT = Path(__file__).resolve().parents[2]
SIZE = ["--vocab=320", "--width=32", "--layers=2"]


def arguments(data: Path | str, out: Path, *options: str) -> list[str]:
    return [f"--data={data}", f"--out={out}", *SIZE, *options]


@pytest.fixture(scope="module")
def script():
    """The script as a module: each process of its own would take seconds to import torch."""
    spec = importlib.util.spec_from_file_location("tiny_model", ROOT / "examples" / "tiny_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(script, monkeypatch):
    def call(*args, **kwargs) -> None:
        monkeypatch.setattr("sys.argv", ["tiny_model.py", *arguments(*args, **kwargs)])
        with torch.random.fork_rng(devices=[]):
            script.main()

    return call


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"question": f"Ann has {i} eggs and finds {i} more. How many?", "answer": f"#### {2 * i}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def built(rows_file, tmp_path_factory) -> tuple[Path, str]:
    """The folder and what was printed."""
    out = tmp_path_factory.mktemp("model")
    done = subprocess.run(
        [sys.executable, "examples/tiny_model.py", *arguments(rows_file, out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def tokenizer(built):
    return AutoTokenizer.from_pretrained(built[0])


@pytest.fixture(scope="module")
def model(built):
    return AutoModelForCausalLM.from_pretrained(built[0])


@pytest.mark.parametrize(
    "text",
    [
        "Ann has 17 eggs.\n\n#### 34",
        "Zürich – 3½ kg, 価格は$5; emoji 🥚\ttab  two spaces ",
        "\x00\x7f",
        "\r\nSuperscript ² and a trailing newline\n",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_prompt_text_costs_few_tokens(tokenizer):
    prompt = question_prompt(tokenizer, "Ann has 7 eggs.")
    assert prompt == f"<|user|>Ann has 7 eggs. {GSM8K_INSTRUCTION}<|end|><|assistant|>"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt
    specials = [i for i in ids if i in tokenizer.all_special_ids]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert {"<|user|>", "<|end|>", "<|assistant|>"} <= set(tokens)
    assert tokenizer.eos_token_id in specials
    assert len(ids) < len(prompt) / 3  # the instruction was among the training texts


def test_end_and_padding_are_set_and_agree_with_the_model(tokenizer, model):
    assert tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|pad|>") == tokenizer.pad_token_id
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_model_has_the_asked_size_and_says_so(built, tokenizer, model):
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen3", 32, 2)
    assert len(tokenizer) == config.vocab_size <= 320
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert f"{model.num_parameters() / 1e6:.2f}M parameters" in built[1]


def test_model_runs(tokenizer, model):
    inputs = tokenizer("Ann has 7 eggs.", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[-1] == len(tokenizer) and logits.isfinite().all()


def test_everything_follows_from_data_and_seed(build, built, rows_file, tmp_path):
    build(rows_file, tmp_path / "again")
    build(rows_file, tmp_path / "other", "--seed=1")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (built[0] / name).read_bytes()
    weights = load_file(built[0] / "model.safetensors")
    others = load_file(tmp_path / "other" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], others[name])


def test_data_takes_a_slice(build, built, tmp_path, rows_file):
    build(f"train[:10%]@{rows_file}", tmp_path / "slice")
    few, all_of_them = (
        AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "slice", built[0])
    )
    assert len(few) <= len(all_of_them) and few.get_vocab() != all_of_them.get_vocab()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab=100"], "--vocab 100: bytes and special tokens alone are 261"),
        (["--width=30"], "--width 30: must be a multiple of 8"),
        (["--layers=0"], "--layers 0: must be at least 1"),
        (["--data=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_options_are_named(build, rows_file, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        build(rows_file, tmp_path / "model", *options)
    assert stop.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(stop.value.code)
    assert not (tmp_path / "model").exists()


def test_row_of_another_form_is_named(build, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1?", "answer": "#### 1"}\n{"prompt": "2?"}\n')
    with pytest.raises(
        SystemExit, match=f"{re.escape(str(rows))}:2: row without answer and question"
    ):
        build(rows, tmp_path / "model")
