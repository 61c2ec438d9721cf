"""Equal where the things are, different where they differ."""

import pytest
from transformers import AutoTokenizer

from RL2.trainer.startup.fingerprints import source_fingerprint, tokenizer_parts
from tests.conftest import make_tiny_tokenizer

LOSS = "def loss(logps, *, power=1.0):\n    return -power * logps\n"


def test_a_source_is_its_text_wherever_it_lies(tmp_path):
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(LOSS + ("# more\n" if name == "c.py" else ""))
    one, same, other = (source_fingerprint(tmp_path / f"{name}.py") for name in "abc")
    assert one == same == source_fingerprint(str(tmp_path / "a.py")) != other


# What a file imports, in which file that stands, and what the file is.
IMPORTS = {
    "import helper": ("helper.py", "x = 1"),
    "async def step():\n    from helper import x as y": ("helper.py", "x = 1"),
    "import first": ("helper.py", "x = 1"),  # which first.py imports
    "from package import part": ("package/part.py", "x = 1"),
    "import package.part": ("package/__init__.py", ""),
    "from package.part import x": ("package/other.py", "x = 1"),  # which part.py imports
    "import space.part": ("space/part.py", "x = 1"),
}


@pytest.mark.parametrize("text", IMPORTS)
def test_modules_of_ones_own_belong_to_a_source(tmp_path, text):
    (tmp_path / "package").mkdir()
    (tmp_path / "space").mkdir()
    (tmp_path / "first.py").write_text("import helper, first, json, torch, no_such_module")
    for file, content in IMPORTS.values():
        (tmp_path / file).write_text(content)
    (tmp_path / "package/part.py").write_text("from .other import x\nfrom . import __init__")
    path = tmp_path / "env.py"
    path.write_text(text)
    before = source_fingerprint(path)
    file = tmp_path / IMPORTS[text][0]
    file.write_text(f"{file.read_text()}\n# edited")
    assert source_fingerprint(path) != before
    (tmp_path / "stranger.py").write_text("x = 1")
    after = source_fingerprint(path)
    (tmp_path / "stranger.py").write_text("x = 2")
    assert source_fingerprint(path) == after


def test_a_source_that_is_no_python(tmp_path):
    (tmp_path / "a.so").write_bytes(b"\0\xff")
    assert source_fingerprint(tmp_path / "a.so")


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
        (_with_token, {"vocabulary", "tokenizer"}),
        (_with_eos, {"tokenizer"}),
        (_with_rule, {"tokenizer"}),
        (_with_padding, set()),
    ):
        after = make_tiny_tokenizer()
        change(after)
        one, other = tokenizer_parts(before), tokenizer_parts(after)
        assert {name for name in one if one[name] != other[name]} == parts, change.__name__


def test_a_tokenizer_that_was_saved_elsewhere_is_the_same(tmp_path):
    make_tiny_tokenizer().save_pretrained(tmp_path / "first")
    first = AutoTokenizer.from_pretrained(tmp_path / "first")
    first.save_pretrained(tmp_path / "again")
    second = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer_parts(first) == tokenizer_parts(second)
