"""Equal where the things are, different where they differ."""

from functools import partial, wraps

from transformers import AutoTokenizer

from RL2.algorithms.losses import LOSSES
from RL2.algorithms.token_loss import resolve_loss
from RL2.trainer.fingerprints import source_fingerprint, tokenizer_fingerprint, tokenizer_parts
from tests.conftest import make_tiny_tokenizer

LOSS = "def loss(logps, *, power=1.0):\n    return -power * logps\n"


def test_a_source_is_its_text_wherever_it_lies(tmp_path):
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(LOSS + ("# more\n" if name == "c.py" else ""))
    one, same, other = (source_fingerprint(tmp_path / f"{name}.py") for name in "abc")
    assert one == same == source_fingerprint(str(tmp_path / "a.py")) != other


def test_a_function_is_the_file_that_it_stands_in(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(LOSS)
    loss = resolve_loss({"import_path": f"{path}:loss", "power": 2.0})
    expected = source_fingerprint(path)
    assert source_fingerprint(loss.function) == expected
    assert source_fingerprint(loss.function.func) == expected
    assert source_fingerprint(partial(partial(loss.function))) == expected
    wrapped = wraps(loss.function.func)(lambda *args: None)
    assert source_fingerprint(wrapped) == expected
    assert source_fingerprint(next(iter(LOSSES.values()))) != expected


def test_an_object_without_a_file_has_its_name():
    assert source_fingerprint(len) != source_fingerprint(sum)


def _with_template(tokenizer):
    tokenizer.chat_template += " "


def _with_token(tokenizer):
    tokenizer.add_tokens(["<more>"])


def _with_eos(tokenizer):
    tokenizer.eos_token = tokenizer.pad_token


def _with_rule(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True


def _with_padding(tokenizer):
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=2)


def test_each_part_of_a_tokenizer_has_its_own():
    before = make_tiny_tokenizer()
    for change, parts in (
        (_with_template, {"chat template"}),
        (_with_token, {"vocabulary", "rules"}),
        (_with_eos, {"rules"}),
        (_with_rule, {"rules"}),
        (_with_padding, set()),
    ):
        after = make_tiny_tokenizer()
        change(after)
        one, other = tokenizer_parts(before), tokenizer_parts(after)
        assert {name for name in one if one[name] != other[name]} == parts, change.__name__
        differs = tokenizer_fingerprint(before) != tokenizer_fingerprint(after)
        assert differs is bool(parts)


def test_a_tokenizer_that_was_saved_elsewhere_is_the_same(tmp_path):
    make_tiny_tokenizer().save_pretrained(tmp_path / "first")
    first = AutoTokenizer.from_pretrained(tmp_path / "first")
    first.save_pretrained(tmp_path / "again")
    second = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
