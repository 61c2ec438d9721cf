"""Where a turn ends, by what a model's files say: families of templates, kinds of tokenizers."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, GenerationConfig, LlamaConfig

from RL2.datasets.end_of_turn import end_tokens, load_end_tokens, special_ids
from RL2.runtime.errors import ConfigError
from tests.chat_templates import FAMILIES, KINDS, tokenizer_of
from tests.conftest import make_tiny_tokenizer


def texts(tokenizer, ids):
    return set(tokenizer.convert_ids_to_tokens(list(ids)))


def generation(tokenizer, names):
    return GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(list(names)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_closes_a_turn(name, kind):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, kind)
    # With what an instruct model says, with what a base model does, and with the tokenizer alone.
    for names in (family.generation, (family.eos,), None):
        ends = end_tokens(tokenizer, names and generation(tokenizer, names))
        assert (ends.turn is not None) == family.closes
        if family.closes:
            assert texts(tokenizer, [ends.turn]) == {family.end}
        assert {family.end, family.eos} <= texts(tokenizer, ends.ids)
        assert texts(tokenizer, ends.saved) == set(names or ())
        assert ends.last == tokenizer.eos_token_id
        # Nothing that stands within a turn ends it.
        inner = {"<|end|>"} if name == "harmony" else {"<|END_RESPONSE|>", "<|im_start|>"}
        assert not inner & texts(tokenizer, ends.ids)


def test_markers_of_all_roles_that_may_follow():
    tokenizer = tokenizer_of(FAMILIES["glm"])
    assert texts(tokenizer, end_tokens(tokenizer).ids) == {
        "<|endoftext|>", "<|user|>", "<|observation|>",
    }  # fmt: skip


def test_markers_that_are_no_tokens_end_nothing():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{m.role}}|>\n{{m.content}}{% endfor %}"
    ends = end_tokens(tokenizer)
    assert ends.ids == (tokenizer.eos_token_id,) and ends.turn is None


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }}{{ '\\ud800' }}{% endfor %}",
        "nothing of what was said",
        "{% for m in messages %}{{ m.content / 0 }}{% endfor %}",
    ],
)
def test_without_a_template_that_tells(template):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    assert end_tokens(tokenizer).ids == (tokenizer.eos_token_id,)


def test_what_a_tokenizer_does_not_know_ends_nothing():
    tokenizer = tokenizer_of(FAMILIES["chatml"], "words")
    tokenizer.chat_template = (
        "{% for m in messages %}Speaker {{ m.role }} says {{ m.content }} done. {% endfor %}"
    )
    ends = end_tokens(tokenizer)
    assert ends.turn is None and ends.ids == (tokenizer.eos_token_id,)
    assert tokenizer.unk_token_id not in ends.special
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2
    assert tokenizer.eos_token_id in end_tokens(tokenizer).special


def test_all_that_the_files_name():
    tokenizer = make_tiny_tokenizer()
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=5)).ids == (5, 256)
    ends = end_tokens(tokenizer, GenerationConfig(eos_token_id=[7, 257]), LlamaConfig())
    assert ends.ids == (7, 257, 256)  # not the 2 that is its class's default
    assert ends.saved == (7, 257)
    assert end_tokens(tokenizer, None, LlamaConfig(eos_token_id=[9, 3])).ids == (9, 3, 256)
    ends = end_tokens(tokenizer, GenerationConfig(), LlamaConfig(eos_token_id=257))
    assert (ends.ids, ends.saved) == ((257, 256), ())
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=-1)).ids == (256,)


def test_a_tokenizer_without_an_end():
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None
    ends = end_tokens(tokenizer)
    assert tokenizer.decode([ends.turn]) == "<|im_end|>" and ends.last is None
    tokenizer.chat_template = None
    assert end_tokens(tokenizer).ids == ()
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=[7, 8])).last == 7


def test_special_tokens_are_all_that_are_marked():
    tokenizer = tokenizer_of(FAMILIES["phi3"])
    named = set(tokenizer.all_special_ids)
    assert texts(tokenizer, special_ids(tokenizer) - named) == set(FAMILIES["phi3"].tokens)


def test_an_end_that_the_model_does_not_have(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml_base"])
    node = SimpleNamespace(model_name=str(tmp_path), revision=None, trust_remote_code=False)
    LlamaConfig(vocab_size=258, eos_token_id=256).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 258 < len(tokenizer) == 259
    with pytest.raises(
        ConfigError, match=r"a turn ends with <\|im_end\|>, which is token 258, but"
    ):
        load_end_tokens(node, tokenizer)
    LlamaConfig(vocab_size=259, eos_token_id=256).save_pretrained(tmp_path)
    assert load_end_tokens(node, tokenizer).ids == (256, 258)
    # Without a template nothing asks for it: it is never written, and no completion ends with it.
    LlamaConfig(vocab_size=256, eos_token_id=256).save_pretrained(tmp_path)
    tokenizer.chat_template = None
    ends = load_end_tokens(node, tokenizer)
    assert (ends.ids, ends.last) == ((), None)
    tokenizer = tokenizer_of(FAMILIES["chatml_base"])
    LlamaConfig(vocab_size=259, eos_token_id=256).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[10, 11]).save_pretrained(tmp_path)
    ends = load_end_tokens(node, tokenizer)
    assert (ends.ids, ends.saved) == ((10, 11, 256, 258), (10, 11))
