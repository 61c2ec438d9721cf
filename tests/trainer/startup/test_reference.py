"""What is made from the schema is as the schema says."""

import pytest

from RL2.algorithms import ADVANTAGES
from RL2.config.schema import SCHEMAS, keys_of
from RL2.trainer.startup.keys import listed_names, type_in_words
from RL2.trainer.startup.reference import PAGE, commented, written

AGAIN = "run `python -m RL2.trainer.startup.reference` to write it anew"


def test_the_files_are_as_the_schema_says():
    for path, text in written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: {AGAIN}"


@pytest.mark.parametrize("trainer", SCHEMAS)
def test_the_page_has_every_key_of_every_trainer(trainer):
    page = PAGE.read_text(encoding="utf-8")
    for name, key in keys_of(SCHEMAS[trainer]).items():
        assert key.is_group or page.count(f"\n| `{name}` |") == 1, name


def test_comments_are_made_anew():
    keys = keys_of(SCHEMAS["sft"])
    text = "# head\ndefaults: [x]\nactor:\n  # old\n  lr: 1\n\nhydra:\n  # kept\n  a: 1\n"
    once = commented(text, keys, {})
    assert once == text.replace("# old", "# peak learning rate of AdamW")
    assert commented(once, keys, {}) == once


def test_types_in_words():
    keys = keys_of(SCHEMAS["spo"])
    for name, said in {
        "actor.lr": "number",
        "trainer.max_steps": "whole number or null",
        "actor.kl.type": "loss | reward | advantage or null",
        "adv.estimator": " | ".join(ADVANTAGES),
        "actor.loss.options": "mapping {name: value}",
        "rollout.server_args": "list of texts",
        "actor.use_liger_kernel": "auto, true or false",
    }.items():
        assert type_in_words(name, keys[name], listed_names()) == said
