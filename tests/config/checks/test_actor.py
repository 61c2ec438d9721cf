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


def test_schedules_and_betas(message, composed):
    assert message("ppo", "actor.min_lr_ratio=0.1") == (
        "actor.min_lr_ratio=0.1: has no effect with actor.scheduler=constant, which does not fall; "
        "use cosine or linear, or leave it out"
    )
    text = message("sft", "actor.decay_ratio=0.2", "actor.scheduler=cosine")
    assert text.startswith("actor.decay_ratio=0.2: has no effect with actor.scheduler=cosine; use ")
    text = message("ppo", "actor.scheduler=warmup_stable_decay", "actor.warmup_ratio=0.95")
    assert text.startswith("actor.warmup_ratio=0.95: leaves less than actor.decay_ratio=0.1 of ")
    text = message("ppo", "actor.scheduler=polynomial", "actor.lr=1e-7")
    assert text.startswith("actor.lr=1e-07: actor.scheduler=polynomial ends at 1e-7; give actor")
    for betas in ("[0.9]", "[0.9,1]", "[-0.1,0.9]", "[]"):
        text = message("ppo", f"actor.betas={betas}")
        assert ": must be two numbers, 0 or more and below 1, such as [0.9,0.95]" in text
    for good in ("betas=[0,0.95]", "scheduler=warmup_stable_decay"):
        validate(composed("sft", f"actor.{good}"), 1)
    validate(composed("ppo", "actor.scheduler=cosine", "actor.min_lr_ratio=0.1"), 1)
