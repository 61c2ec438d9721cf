"""The trained model."""

import pytest

from RL2.config import validate
from tests.config.support import write_model_files


@pytest.mark.parametrize("value", ["yes", "null", "[true]", "2", "off"])
def test_liger(message, composed, value):
    for key, name in [("actor", "sft"), ("actor", "spo"), ("ref_actor", "ppo")]:
        text = message(name, f"{key}.use_liger_kernel={value}")
        shown = {"null": "None", "[true]": "[True]"}.get(value, value)
        assert text == f"{key}.use_liger_kernel={shown}: must be auto, true or false"
    for good in ("auto", "true", "false"):
        validate(composed("ppo", f"actor.use_liger_kernel={good}"), 1)


def test_model_name(message, composed, workdir):
    for name in ("gpt2", "./nowhere", "~/nowhere", "/no/where", "a/b/c"):
        text = message("spo", f"actor.model_name='{name}'")
        where = "" if name[0] == "/" else f" in {workdir}"
        assert text.startswith(f"actor.model_name={name}: no such folder{where}, and not a hub id")
    (workdir / "models" / "tiny").mkdir(parents=True)
    assert "no config.json" in message("spo", "actor.model_name=models/tiny")
    assert "no such folder" in message("spo", "actor.model_name=models/tyni")
    write_model_files(workdir / "models" / "tiny")
    validate(composed("spo", "actor.model_name=models/tiny"), 1)


@pytest.mark.parametrize("name, default", [("ppo", 0), ("spo", 0), ("spo_0p5", 0), ("sft", None)])
def test_dropout_is_off_or_the_models_own(composed, name, default):
    assert composed(name).actor.dropout == default
    for value in ("0", "0.0", "null"):
        validate(composed(name, f"actor.dropout={value}"), 1)
