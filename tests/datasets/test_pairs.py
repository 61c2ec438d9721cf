import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from RL2.datasets import PairDataset, SFTDataset
from RL2.datasets.end_of_turn import end_tokens
from RL2.runtime.errors import DataError
from tests.chat_templates import FAMILIES, tokenizer_of
from tests.prefix_tokenizers import PREFIX_TOKENIZERS

TEXTS = {"prompt": "How many?", "chosen": "two", "rejected": "three"}
PROMPT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "héllo"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "and?"},
]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(tokenizer, rows: list, scored: bool = False, **config) -> PairDataset:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PairDataset(OmegaConf.create({"path": "rows.jsonl", **config}), tokenizer, scored=scored)


def sft(tokenizer, row: dict, **config) -> dict:
    Path("sft.jsonl").write_text(json.dumps(row) + "\n")
    return SFTDataset(OmegaConf.create({"path": "sft.jsonl", **config}), tokenizer)[0]


def error_of(tokenizer, rows: list, **config) -> str:
    with pytest.raises(DataError) as caught:
        load(tokenizer, rows, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_shares_prompt(pair: dict) -> None:
    n, m = (one["action_mask"].index(True) for one in pair.values())
    assert pair["chosen"]["token_ids"][:n] == pair["rejected"]["token_ids"][:m]


# ------------------------------------------------------------------------------ row formats


@pytest.mark.parametrize("kind", [None, *PREFIX_TOKENIZERS])
@pytest.mark.parametrize("separator", ["", "\nA: "])
def test_texts_are_tokenised_as_in_sft(tiny_tokenizer, kind, separator):
    tokenizer = PREFIX_TOKENIZERS[kind]() if kind else tiny_tokenizer
    (pair,) = load(tokenizer, [TEXTS], separator=separator)
    for side, sequence in pair.items():
        row = {"prompt": TEXTS["prompt"], "response": TEXTS[side]}
        assert sequence == sft(tokenizer, row, separator=separator)
    check_shares_prompt(pair)


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_are_tokenised_as_in_sft(name):
    """The last turn alone is learned, and the forms of a row give the same."""
    tokenizer = tokenizer_of(FAMILIES[name])
    prompt = [{"role": "user", "content": "what is it ?"}]
    good, bad = said("forty- two"), said("#### 42")
    forms = [
        {"messages": prompt, "chosen": good["content"], "rejected": bad["content"]},
        {"prompt": prompt, "chosen": good["content"], "rejected": bad["content"]},
        {"prompt": prompt, "chosen": [good], "rejected": [bad]},
        {"prompt": prompt, "chosen": [*prompt, good], "rejected": [*prompt, bad]},
        {"prompt": "what is it ?", "chosen": [*prompt, good], "rejected": [*prompt, bad]},
        {"chosen": [*prompt, good], "rejected": [*prompt, bad]},
        # as in a cell of a CSV file
        {"messages": json.dumps(prompt), "chosen": good["content"], "rejected": bad["content"]},
        {"chosen": json.dumps([*prompt, good]), "rejected": json.dumps([*prompt, bad])},
    ]
    for pair in load(tokenizer, forms):
        for answer, sequence in zip((good, bad), pair.values(), strict=True):
            whole = sft(tokenizer, {"messages": [*prompt, answer]})
            n = len(whole["token_ids"]) - whole["action_mask"][::-1].index(True)  # behind the turn
            assert sequence["token_ids"] == whole["token_ids"][:n]
            assert sequence["action_mask"] == whole["action_mask"][:n]
        check_shares_prompt(pair)


def test_only_the_last_turn_is_learned(tiny_tokenizer):
    row = {"messages": PROMPT, "chosen": "yes", "rejected": [said("no")]}
    (pair,) = load(tiny_tokenizer, [row])
    for sequence, text in zip(pair.values(), ("yes", "no"), strict=True):
        n = sequence["action_mask"].index(True)
        assert all(sequence["action_mask"][n:])
        assert tiny_tokenizer.decode(sequence["token_ids"][n:]) == f"{text}<|im_end|>"
        before = tiny_tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)["input_ids"]
        assert sequence["token_ids"][:n] == before


def test_tools_go_to_the_template(tiny_tokenizer):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "what"}}
    row = {"messages": PROMPT[1:2], "chosen": "it", "rejected": "is"}
    without, with_tools = load(tokenizer, [row, row | {"tools": [tool]}])
    longer, shorter = (len(one["chosen"]["token_ids"]) for one in (with_tools, without))
    assert longer > shorter


@pytest.mark.parametrize("columns", [("messages", "chosen"), ("prompt", "rejected"), ("chosen",)])
def test_messages_as_json_texts(tiny_tokenizer, columns):
    """As the cells of a CSV file have them, whichever columns they are in."""
    row = {"prompt": PROMPT, "chosen": [said("it")], "rejected": [said("is")]}
    if "messages" in columns:
        row["messages"] = row.pop("prompt")
    if columns == ("chosen",):
        del row["prompt"]
        row |= {side: [*PROMPT, *row[side]] for side in ("chosen", "rejected")}
    plain = list(load(tiny_tokenizer, [row]))
    assert list(load(tiny_tokenizer, [row | {c: json.dumps(row[c]) for c in columns}])) == plain
    talks = {side: json.dumps([*PROMPT, said(side)]) for side in ("chosen", "rejected")}
    with_prompt = {"prompt": "x"} | talks
    lists = with_prompt | {side: json.loads(talk) for side, talk in talks.items()}
    assert list(load(tiny_tokenizer, [with_prompt])) == list(load(tiny_tokenizer, [lists]))
    other_json = TEXTS | {"chosen": "[1, 2]", "rejected": '[{"a": 1}]'}
    (pair,) = load(tiny_tokenizer, [other_json])
    assert tiny_tokenizer.decode(pair["chosen"]["token_ids"]).count("[1, 2]") == 1


def test_scored_pairs_mark_one_token_behind_the_end(tiny_tokenizer):
    """The state before it has seen the whole sequence, its end included, and max_length counts
    only what is read."""
    (plain,) = load(tiny_tokenizer, [TEXTS])
    longest = max(len(one["token_ids"]) for one in plain.values())
    (scored,) = load(tiny_tokenizer, [TEXTS], scored=True, max_length=longest)
    for side, sequence in scored.items():
        ids = plain[side]["token_ids"]
        assert sequence["token_ids"][:-1] == ids and len(sequence["token_ids"]) == len(ids) + 1
        assert sequence["action_mask"] == [False] * len(ids) + [True]
    assert load(tiny_tokenizer, [TEXTS], scored=True).end_ids == (tiny_tokenizer.eos_token_id,)


# ------------------------------------------------------------------------------ what is left out


def test_useless_pairs_are_left_out_and_counted(tiny_tokenizer, caplog):
    empty = [
        TEXTS | {"chosen": ""}, TEXTS | {"rejected": " \n"},
        {"messages": PROMPT, "chosen": [said("")], "rejected": "no"},
        {"messages": PROMPT, "chosen": "yes", "rejected": []},
        {"chosen": [*PROMPT, said("yes")], "rejected": [*PROMPT, said("  ")]},
    ]  # fmt: skip
    rows = [TEXTS, TEXTS | {"chosen": "three"}, *empty]
    with caplog.at_level("WARNING", logger="RL2"):
        dataset = load(tiny_tokenizer, rows)
    assert list(dataset) == list(load(tiny_tokenizer, [TEXTS]))
    assert [record.message for record in caplog.records] == [
        "data.path: 6 of 7 pairs are left out: 1 with the same chosen and rejected (first at "
        "rows.jsonl:2), 5 with an empty response (first at rows.jsonl:3)"
    ]
    assert error_of(tiny_tokenizer, rows[1:]) == (
        "data.path: none of the 6 pairs can be learned: 1 with the same chosen and rejected (first "
        "at rows.jsonl:1), 5 with an empty response (first at rows.jsonl:2); give pairs of two "
        "different answers"
    )


def test_overlong_counts_the_longer_one(tiny_tokenizer, caplog):
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in (("xx", "y"), ("x", "y" * 9))]
    rows.insert(0, {"prompt": "p", "chosen": "a" * 20, "rejected": "a" * 20})
    assert error_of(tiny_tokenizer, rows, max_length=10) == (
        "data.max_length=10: 1 of 2 pairs are longer (longest 11 tokens, first at rows.jsonl:3); "
        "raise data.max_length and actor.max_length_per_device, or set data.overlong=drop"
    )
    assert len(load(tiny_tokenizer, rows, max_length=11)) == 2
    (pair,) = load(tiny_tokenizer, rows, max_length=10, overlong="drop")
    assert len(pair["chosen"]["token_ids"]) == 4
    # the same pair, wherever the one that is dropped stands
    last_first = load(tiny_tokenizer, rows[::-1], max_length=10, overlong="drop")
    assert list(last_first) == [pair] == list(load(tiny_tokenizer, rows[1:2]))
    assert last_first.fingerprint == load(tiny_tokenizer, rows[1:2]).fingerprint


def test_fingerprint_is_that_of_the_rows_which_are_kept(tiny_tokenizer):
    one = load(tiny_tokenizer, [TEXTS]).fingerprint
    assert load(tiny_tokenizer, [TEXTS | {"chosen": ""}, TEXTS]).fingerprint == one
    assert load(tiny_tokenizer, [TEXTS | {"chosen": "2"}]).fingerprint != one


# ------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, 'row without rejected: it has the keys chosen, prompt; a '
         'row is {"messages", "chosen", "rejected"} or {"prompt", "chosen", "rejected"} or '),
        (TEXTS | {"chosen": None}, "chosen is null; it must be a non-empty string"),
        (TEXTS | {"rejected": 5}, "rejected is a number"),
        (TEXTS | {"prompt": ""}, "prompt is empty"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a string; give the prompt as well"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "chosen begins with an assistant turn"),
        ({"chosen": PROMPT, "rejected": PROMPT}, "chosen ends with a turn of the user"),
        ({"messages": [*PROMPT, said("x")], "chosen": "a", "rejected": "b"},
         "messages ends with an assistant turn"),
        ({"messages": PROMPT, "chosen": [{"content": "x"}], "rejected": "b"},
         "chosen[0] without role"),
        ({"messages": PROMPT, "chosen": 1, "rejected": "b"}, "chosen is a number; it must be"),
        ({"chosen": [*PROMPT, said("a")], "rejected": [*PROMPT[1:], said("b")]},
         "chosen and rejected differ before their last turn, from turn 0 on (counted from 0)"),
        ({"chosen": [*PROMPT, said("a")], "rejected": [*PROMPT[:2], said("b")]},
         "differ before their last turn, from turn 2 on"),
    ],
)  # fmt: skip
def test_bad_row_is_named(tiny_tokenizer, row, problem):
    message = error_of(tiny_tokenizer, [TEXTS, row])
    assert message.startswith("data.path: rows.jsonl:2: ") and problem in message


@pytest.mark.parametrize(("name", "value"), [("score", 1), ("tools", [{"type": "function"}])])
def test_unread_columns_are_named(tiny_tokenizer, caplog, name, value):
    """A prompt text goes through no template that would show tools."""
    with caplog.at_level("WARNING", logger="RL2"):
        load(tiny_tokenizer, [TEXTS | {name: value}])
    assert f"columns that are not read: {name} in 1 rows" in caplog.text


def test_end_ids_are_those_that_close_the_turns():
    tokenizer = tokenizer_of(FAMILIES["gemma"])
    dataset = load(tokenizer, [{"messages": PROMPT[1:2], "chosen": "it", "rejected": "is"}])
    assert set(dataset.end_ids) <= set(end_tokens(tokenizer).ids) and dataset.end_ids
