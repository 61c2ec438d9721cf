"""Secrets that a config would put where others see them."""

import pytest

from RL2.config import check_overrides, validate
from RL2.runtime.errors import ConfigError
from RL2.trainer.registries import registry_of

CANARY = "canary-4f1b9c"


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
        check_overrides("spo", [line], registry_of)
    assert str(caught.value).startswith(f"{shown}: a secret on the command line")
    check_overrides("spo", ["actor.loss.options.api_key=null"], registry_of)


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
