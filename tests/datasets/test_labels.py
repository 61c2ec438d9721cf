import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from RL2.datasets import LabelDataset, SFTDataset
from RL2.datasets.labels import mismatched
from RL2.runtime.errors import DataError

ROW = {"prompt": "How many?", "completion": "two", "label": True}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(tokenizer, rows: list, **config) -> LabelDataset:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LabelDataset(OmegaConf.create({"path": "rows.jsonl", **config}), tokenizer)


def test_rows_are_those_of_sft_with_a_label(tiny_tokenizer):
    talk = [{"role": "user", "content": "How many?"}]
    rows = [
        ROW, {"messages": talk, "completion": "two", "label": False},
        {"prompt": talk, "completion": [{"role": "assistant", "content": "two"}], "label": 0},
    ]  # fmt: skip
    text, one, other = load(tiny_tokenizer, rows)
    Path("sft.jsonl").write_text('{"prompt": "How many?", "response": "two"}\n')
    (plain,) = SFTDataset(OmegaConf.create({"path": "sft.jsonl"}), tiny_tokenizer)
    assert text == plain | {"labels": [1.0] * len(plain["token_ids"])}
    assert one == other and set(one["labels"]) == {-1.0}


@pytest.mark.parametrize(
    ("label", "value"), [(True, 1), (1, 1), (1.0, 1), ("True", 1), (False, -1), (-1, -1), ("0", -1)]
)
def test_labels(tiny_tokenizer, label, value):
    assert load(tiny_tokenizer, [ROW | {"label": label}])[0]["labels"][0] == value


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (ROW | {"label": 0.5}, "label is 0.5; use true for a desired answer and false"),
        (ROW | {"label": None}, "label is null"),
        (ROW | {"label": "good"}, "label is 'good'"),
        ({"prompt": "a", "completion": "b"}, "row without label"),
        (ROW | {"completion": 3}, "completion is a number"),
    ],
)
def test_bad_row_is_named(tiny_tokenizer, row, problem):
    with pytest.raises(DataError) as caught:
        load(tiny_tokenizer, [ROW, row])
    assert str(caught.value).startswith("data.path: rows.jsonl:2: ")
    assert problem in str(caught.value)


def test_empty_completions_are_left_out_and_counted(tiny_tokenizer, caplog):
    with caplog.at_level("WARNING", logger="RL2"):
        assert len(load(tiny_tokenizer, [ROW, ROW | {"completion": " "}])) == 1
    assert "1 of 2 rows are left out: empty completions, the first at rows.jsonl:2" in caplog.text
    with pytest.raises(DataError, match="all 1 rows have empty completions"):
        load(tiny_tokenizer, [ROW | {"completion": ""}])


def test_a_label_stays_with_its_answer_whatever_is_left_out(tiny_tokenizer):
    """Behind an empty completion and one that is too long."""
    rows = [
        ROW | {"completion": ""}, ROW | {"completion": "t" * 50}, ROW | {"label": False}, ROW,
    ]  # fmt: skip
    found = load(tiny_tokenizer, rows, max_length=20, overlong="drop")
    assert list(found) == list(load(tiny_tokenizer, rows[2:]))
    assert [item["labels"][0] for item in found] == [-1, 1]
    assert found.fingerprint == load(tiny_tokenizer, rows[2:]).fingerprint


def test_mismatched_answers(tiny_tokenizer):
    rows = [
        {"prompt": p, "completion": c, "label": True} for p, c in zip("abc", "xyz", strict=True)
    ]
    items = list(load(tiny_tokenizer, rows))
    found = mismatched(items)
    end = tiny_tokenizer.eos_token
    texts = [tiny_tokenizer.decode(one["token_ids"]) for one in found]
    assert texts == ["az" + end, "bx" + end, "cy" + end]
    assert all(one["action_mask"] == items[0]["action_mask"] for one in found)
    assert all(set(one["labels"]) == {0.0} for one in found)
    assert [tiny_tokenizer.decode(one["token_ids"]) for one in mismatched(items, 2)] == [
        "az", "bx", "cy"
    ]  # fmt: skip
