"""Keys of `actor.lora`: ranges, what has no effect, and what has to be installed."""

import pytest

from RL2.config import apply_fallbacks, validate
from RL2.runtime.errors import ConfigError

UNCHANGED = {"alpha": 32, "dropout": 0.0, "target_modules": "all-linear", "rank": None}


@pytest.mark.parametrize("name", ["ppo", "spo", "sft"])
def test_off_by_default_and_seeded_as_the_run(composed, name):
    lora = composed(name, "trainer.seed=7").actor.lora
    assert {key: lora[key] for key in UNCHANGED} == UNCHANGED
    assert lora.seed == 7


@pytest.mark.parametrize("name", ["spo", "sft"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["actor.lora.rank=16"],
        ["actor.lora.rank=16", "actor.lora.target_modules=q_proj", "actor.lora.alpha=1"],
        ["actor.lora.rank=1", "actor.lora.target_modules=[q_proj,v_proj]"],
        ["actor.lora.rank=16", "actor.lora.dropout=0.5", "actor.lora.seed=3"],
    ],
)
def test_what_works(composed, name, overrides):
    validate(composed(name, *overrides), 1)


@pytest.mark.parametrize(
    "override",
    [
        "actor.lora.rank=0",
        "actor.lora.alpha=0",
        "actor.lora.dropout=1.0",
        "actor.lora.dropout=-0.1",
        "actor.lora.seed=-1",
    ],
)
def test_ranges(message, override):
    assert message("spo", "actor.lora.rank=4", override).startswith(f"{override}: must be ")


@pytest.mark.parametrize(
    "override",
    [
        "actor.lora.alpha=16",
        "actor.lora.dropout=0.1",
        "actor.lora.target_modules=q_proj",
        "actor.lora.target_modules=[q_proj,v_proj]",
    ],
)
@pytest.mark.parametrize("name", ["spo", "sft"])
def test_without_a_rank_the_others_have_no_effect(message, name, override):
    text = message(name, override).replace("'", "").replace(", ", ",")
    assert text.startswith(f"{override}: has no effect without actor.lora.rank")
    assert text.endswith("or leave it out")


@pytest.mark.parametrize("value", ["null", "[]", "3", "[q_proj,4]", "''", "{q_proj: 1}"])
def test_targets_are_texts(message, value):
    text = message("sft", "actor.lora.rank=4", f"actor.lora.target_modules={value}")
    assert text.startswith("actor.lora.target_modules=") and "[q_proj,v_proj]" in text


def test_all_linear_is_the_only_name(message):
    text = message("sft", "actor.lora.rank=4", "actor.lora.target_modules=[q_proj,all-linear]")
    assert "all-linear must be the only name" in text


def test_peft_has_to_be_there(composed):
    for name in ("ppo", "sft"):
        config = composed(name, "actor.lora.rank=4")
        with pytest.raises(ConfigError) as caught:
            apply_fallbacks(config, False, set())
        assert str(caught.value).startswith("actor.lora.rank=4: needs peft")
        assert "pip install RL2[lora]" in str(caught.value)
        assert apply_fallbacks(config, False, {"peft"}) == []


def test_dropout_does_not_go_with_tensor_parallelism(message):
    text = message(
        "sft", "actor.lora.rank=4", "actor.lora.dropout=0.1", "actor.tp_size=2", world_size=2
    )
    assert text.startswith(
        "actor.lora.dropout=0.1: tensor-parallel ranks would leave out different"
    )
