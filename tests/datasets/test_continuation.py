import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from RL2.datasets.continuation import continuation_encoder, puts_something_before
from tests.prefix_tokenizers import PREFIX_TOKENIZERS, metaspace

TEXTS = ["4", " 4", "yes", " yes", "s?", "\n4", "4 and 5", "(a) b", "= 4", ".5", "0", "a"]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", PREFIX_TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_continuation_are_the_tokens_of_the_whole(kind, text):
    tokenizer = PREFIX_TOKENIZERS[kind]()
    assert puts_something_before(tokenizer)
    (ids,) = continuation_encoder(tokenizer)([text])
    for prompt in ("2+2=", "How many?", "x"):
        assert ids_of(tokenizer, prompt) + ids == ids_of(tokenizer, prompt + text)


@pytest.mark.parametrize("kind", PREFIX_TOKENIZERS)
def test_nothing_stands_between(kind):
    tokenizer = PREFIX_TOKENIZERS[kind]()
    (ids,) = continuation_encoder(tokenizer)(["4"])
    assert tokenizer.decode(ids_of(tokenizer, "2+2=") + ids).strip() == "2+2=4"
    assert tokenizer.decode(ids_of(tokenizer, "2+2=") + ids_of(tokenizer, "4")).strip() != "2+2=4"


def test_merges_over_the_edge_stay_apart():
    """`ny` is one token, but the prompt of a rollout ends with `n`."""
    tokenizer = metaspace("first")
    (ids,) = continuation_encoder(tokenizer)(["yes"])
    before = ids_of(tokenizer, "man")
    assert ids_of(tokenizer, "manyes") != before + ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["yes"]


def test_text_without_tokens_and_unknown_text():
    for make in PREFIX_TOKENIZERS.values():
        tokenizer = make()
        assert continuation_encoder(tokenizer)(["", "4"])[0] == []
        (ids,) = continuation_encoder(tokenizer)(["世a"])
        assert ids[-1:] == ids_of(tokenizer, "=a")[-1:] and len(ids) > 1


def test_other_tokenizers_are_left_alone(tiny_tokenizer):
    words = Tokenizer(
        models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2, "=": 3, "1": 4, "##1": 5, "b": 6},
        unk_token="[UNK]")
    )  # fmt: skip
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    for tokenizer in (tiny_tokenizer, metaspace("never"), wrapped):
        assert not puts_something_before(tokenizer)
        texts = [*TEXTS, "\n\n", "  a"]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert continuation_encoder(tokenizer)(texts) == encoded
