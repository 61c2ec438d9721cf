"""End tokens of whole runs: learned, stopped at, saved, and said where a model lacks them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from RL2.trainer.startup.ends import name_ends
from tests.chat_templates import FAMILIES, tokenizer_of
from tests.trainer.support import train, write_env, write_rows


def make_base(folder, name, generation=(), eos=True):
    """A random model whose generation config names `generation`, with the tokenizer of a family."""
    tokenizer = tokenizer_of(FAMILIES[name])
    if not eos:
        tokenizer.eos_token = tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    ids = tokenizer.convert_tokens_to_ids(list(generation))
    model.generation_config = GenerationConfig(eos_token_id=ids or None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl")
    write_env(folder / "env.py")
    return folder


def write_talks(path):
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "42"}]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(16)))
    return path


def saved_ends(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = GenerationConfig.from_pretrained(folder).eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return tokenizer.convert_ids_to_tokens(ids)


def of_ends(caplog):
    return [line for line in caplog.messages if "end token" in line or "stops at" in line]


@pytest.mark.parametrize(
    ("name", "named", "saved"),
    [
        ("chatml_base", ["<|endoftext|>"], ["<|endoftext|>", "<|im_end|>"]),
        ("chatml_base", [], ["<|im_end|>"]),
        ("phi3", ["<|endoftext|>"], ["<|endoftext|>", "<|end|>"]),
        ("gemma", ["<eos>", "<end_of_turn>"], ["<eos>", "<end_of_turn>"]),
        ("glm", [], ["<|endoftext|>"]),
    ],
)
def test_what_is_learned_is_what_final_stops_at(tmp_path, caplog, name, named, saved):
    files = make_base(tmp_path, name, named)
    path = write_talks(files / "talks.jsonl")
    caplog.set_level("INFO", logger="RL2")
    train(files, "sft", tmp_path / "run", data__path=path, trainer__max_steps=1)
    assert saved_ends(tmp_path / "run" / "final") == saved
    if saved == named:
        assert of_ends(caplog) == []
    else:
        (line,) = of_ends(caplog)
        assert f"its generation config stops at {named[0] if named else 'nothing'}; turns" in line
        assert f"are learned to end at {saved[-1]} as well" in line
    loaded = [i for i, line in enumerate(caplog.messages) if line.startswith("model: ")]
    assert loaded and all(caplog.messages.index(line) < loaded[0] for line in of_ends(caplog))


def test_a_base_model_that_learned_its_turns_ends_them(tmp_path, caplog):
    """Supervised until it is sure, a model's rollouts end where its turns do."""
    files = make_base(tmp_path, "chatml_base", ["<|endoftext|>"])
    path = write_talks(files / "talks.jsonl")
    train(
        files, "sft", tmp_path / "sft", data__path=path, actor__lr=5e-3, trainer__n_epochs=30,
        actor__warmup_ratio=0.0,
    )  # fmt: skip
    prompts = "".join(
        json.dumps({"messages": [{"role": "user", "content": "a?"}]}) + "\n" for _ in range(8)
    )
    (files / "rows.jsonl").write_text(prompts)
    env = (
        "async def step(state, action, extra_info):\n"
        "    score = float(action == '42')\n"
        "    return {'reward': score, 'score': score, 'done': True}\n"
    )
    write_env(files / "env.py", env)
    # From the saved model, and from weights beside the base model's own generation config.
    for ends in (None, GenerationConfig(eos_token_id=256)):
        model = tmp_path / "sft" / "final"
        if ends is not None:
            ends.save_pretrained(model)
        rows = train(
            files, "ppo", tmp_path / f"rl{ends is None}", actor__model_name=model,
            trainer__max_steps=1, test_data__path=files / "rows.jsonl", trainer__test_freq=1,
            rollout__train_sampling_params__max_new_tokens=12, actor__lr=1e-9,
        )  # fmt: skip
        assert rows[0]["test/score"] == 1.0
        assert rows[0]["test/length_clip_ratio"] == 0.0
        assert rows[0]["test/avg_response_length"] == 3
        assert saved_ends(tmp_path / f"rl{ends is None}" / "final") == [
            "<|endoftext|>", "<|im_end|>",
        ]  # fmt: skip
    assert any("rollouts stop at <|im_end|> as well" in line for line in of_ends(caplog))


def test_a_model_without_any_end_token(tmp_path, caplog):
    files = make_base(tmp_path, "phi3", eos=False)
    rows = train(files, "ppo", tmp_path / "run", trainer__max_steps=1)
    assert rows[-1]["train/length_clip_ratio"] == 1.0
    (line,) = of_ends(caplog)
    assert line.startswith(f"actor.model_name={files / 'model'}: has no end token in generation_co")
    assert "every response runs to rollout.train_sampling_params.max_new_tokens=6" in line
    assert "set eos_token in its tokenizer_config.json, or give rollout.train_sampl" in line
    caplog.clear()
    stop = {"rollout__train_sampling_params__stop": "abc"}
    train(files, "ppo", tmp_path / "other", trainer__max_steps=1, **stop)
    assert of_ends(caplog) == []


def test_a_step_whose_samples_were_all_cut_off(tmp_path):
    """With rollout.truncated=mask nothing is learned then, and the metrics still tell of them."""
    files = make_base(tmp_path, "phi3", ["<|end|>"])
    mask = {"rollout__truncated": "mask", "rollout__train_sampling_params__max_new_tokens": 1}
    rows = train(files, "spo", tmp_path / "mask", trainer__max_steps=1, **mask)
    assert rows[-1]["train/length_clip_ratio"] == 1.0
    assert rows[-1]["train/score"] == rows[-1]["train/reward"] > 0
    assert "actor/loss" not in rows[-1]
    rows = train(
        files,
        "spo",
        tmp_path / "zero",
        trainer__max_steps=1,
        **mask | {"rollout__truncated": "zero"},
    )
    assert rows[-1]["train/score"] > rows[-1]["train/reward"] == 0.0


def test_odd_settings_are_saved_with_the_end_tokens(tmp_path):
    """As published models have them; changed by hand, transformers refuses to save them."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.generation_config = GenerationConfig(temperature=0.6, top_k=3, eos_token_id=1)
    name_ends(model, (1,), (2,))
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.temperature, saved.top_k) == ([1, 2], 0.6, 3)
