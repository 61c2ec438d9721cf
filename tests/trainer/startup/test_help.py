"""`--help` has every key, its default and its explanation."""

import re
import time
from dataclasses import is_dataclass

import pytest
from omegaconf import OmegaConf

from RL2.config.schema import SCHEMAS, key_types
from RL2.trainer.startup.help import asks_for_help, help_text
from tests.trainer.support import command, composed


def entries(text):
    """{key: (default, explanation)} of a help text."""
    found, key = {}, None
    for line in text.splitlines():
        if match := re.match(r"([a-z_]+\.[\w.]+)=(.*)", line):
            key = match[1]
            found[key] = (match[2], "")
        elif key and line.startswith("    "):
            found[key] = (found[key][0], f"{found[key][1]} {line.strip()}".strip())
    return found


@pytest.mark.parametrize("trainer", SCHEMAS)
def test_every_key_with_its_default_and_explanation(trainer):
    found = entries(help_text(trainer))
    leaves = {key for key, kind in key_types(SCHEMAS[trainer]).items() if not is_dataclass(kind)}
    assert found.keys() == leaves
    assert all(explanation for _, explanation in found.values())
    defaults = composed(trainer, [])
    for key, (default, _) in found.items():
        if "${" not in default and default != "???":
            value = OmegaConf.select(defaults, key)
            assert OmegaConf.from_dotlist([f"x={default}"]).x == value, key


def test_a_trainer_says_what_it_is():
    text = help_text("spo")
    assert "max-target KL on correct samples" in text.partition("Keys and their defaults")[0]
    default, explanation = entries(text)["actor.avg_level"]
    assert default == "sequence"
    assert explanation.startswith(
        "what the summed loss is divided by: token (all action tokens) | sequence"
    )
    assert entries(help_text("spo_0p5"))["actor.loss.name"][0] == "fixed_target_kl"
    assert entries(help_text("ppo"))["actor.lr"][0] == "1e-6"


def test_words_choose():
    some = entries(help_text("ppo", ["--help", "LoRA", "actor.lr=1"]))
    assert "actor.lora.alpha" in some and "train_data.path" not in some
    assert asks_for_help(["a=b", "-h"]) and not asks_for_help(["a=--help"])


def test_the_command_answers_at_once(tmp_path):
    start = time.monotonic()
    done = command("spo", [], flags=("--help",), cwd=tmp_path, fresh=True)
    assert time.monotonic() - start < 20  # torch is not imported
    assert done.returncode == 0 and done.stderr == ""
    assert entries(done.stdout).keys() == entries(help_text("spo")).keys()
    assert max(map(len, done.stdout.splitlines())) <= 100
