"""What is a secret, and text without it."""

import logging
import sys

import pytest

from RL2.config import ConfigError, check_overrides, validate
from RL2.config.secrets import RedactingFormatter, is_secret_name, redact, redact_config

CANARY = "canary-4f1b9c"


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "RL2_SERVER_KEY", "DB_PASSWORD", "--api-key", "options.secret"],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "TOKENIZERS_PARALLELISM", "KEYBOARD", "SSH_AUTH_SOCK", "actor.lora.alpha"],
)
def test_names_of_none(name):
    assert not is_secret_name(name)


def test_values_of_secret_variables(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    monkeypatch.setenv("SOME_TOKEN", CANARY + "-and-more")  # holds the other one
    monkeypatch.setenv("SHORT_KEY", "train")
    assert redact(f"a {CANARY}-and-more b {CANARY} train") == "a *** b *** train"
    assert redact("x of-the-child", {"THEIR_KEY": "of-the-child"}) == "x ***"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:pass@host:1/x", "http://***@host:1/x"),
        ("https://token@host and a@b", "https://***@host and a@b"),
        ("train@openai/gsm8k:main", "train@openai/gsm8k:main"),
        ("hf_abcdefghijklmnopqrst.", "***."),
        ("hf_model", "hf_model"),
    ],
)
def test_forms_of_secrets(text, expected):
    assert redact(text) == expected


def test_config(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    plain = {"a": [f"x{CANARY}", 3], "options": {"api_key": "anything", "n": None, "key": 4}}
    assert redact_config(plain) == {
        "a": ["x***", 3],
        "options": {"api_key": "***", "n": None, "key": 4},
    }


def test_log_lines_and_tracebacks(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    try:
        raise ValueError(CANARY)
    except ValueError:
        record = logging.LogRecord(
            "RL2", 20, "x.py", 1, "got %s", (CANARY,), exc_info=sys.exc_info()
        )
    text = RedactingFormatter("%(message)s").format(record)
    assert text.startswith("got ***\nTraceback") and CANARY not in text


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("actor.loss.options.api_key=abc", "actor.loss.options.api_key=***"),
        ("rollout.server_url=http://u:p@h", "rollout.server_url=http://***@h"),
        (f"trainer.project={CANARY}", "trainer.project=***"),
    ],
)
def test_secrets_do_not_belong_on_command_lines(monkeypatch, line, shown):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    with pytest.raises(ConfigError) as caught:
        check_overrides("spo", [line])
    assert str(caught.value).startswith(f"{shown}: a secret on the command line")
    check_overrides("spo", ["actor.loss.options.api_key=null"])


def test_secrets_of_servers(composed, monkeypatch):
    def message(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(composed("spo", "rollout.engine=vllm", *overrides), 1)
        return str(caught.value)

    text = message("rollout.server_url='http://u:pass@h:1'")
    assert text.startswith("rollout.server_url=http://***@h:1: ") and "RL2_SERVER_KEY" in text
    for arguments in ("[--api-key,abc]", "['--api-key=abc']", "[--hf-token,abc]"):
        text = message(f"rollout.server_args={arguments}")
        assert text.startswith("rollout.server_args: --") and "abc" not in text
