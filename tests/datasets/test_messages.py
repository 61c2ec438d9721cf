"""Conversations from all kinds of files, tools, calls, weights."""

import copy
import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from RL2.datasets import RLDataset, SFTDataset, load_rows
from RL2.runtime.errors import DataError

# As those of models with tools: arguments are encoded by the template, and what is there is shown.
TEMPLATE = (
    "{% if tools %}{{ 'tools:' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '\n' }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] }}"
    "{% if 'tool_calls' in m %}{% for c in m['tool_calls'] %}"
    "{{ '<call>' + c.function.name + c.function.arguments | tojson }}{% endfor %}{% endif %}"
    "{% if 'name' in m %}{{ m['name'] }}{% endif %}"
    "{% if 'weight' in m %}{{ 'weight' }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def call(arguments, name="search"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(text, **fields):
    return {"role": "assistant", "content": text, **fields}


USER = {"role": "user", "content": "hi"}
TOOL = {"role": "tool", "content": "sunny", "name": "search"}
ROWS = [
    {"messages": [USER, said("", tool_calls=[call({"city": "Rome"})]), TOOL, said("sunny")]},
    {"messages": [USER, said("", tool_calls=[call({"query": [{"deep": 1}, {"other": 2}]})])]},
    {"messages": [USER, said("", tool_calls=[call({"filter": {"from": 1}})])]},
    {"messages": [USER, said("hello")]},
]
SCHEMA = {
    "type": "function",
    "function": {"name": "search", "parameters": {"properties": {"city": {"type": "string"}}}},
}
OTHER = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"b": {"default": 1}}}},
}


def write(name: str, rows: list) -> str:
    """The rows as each kind of file has them."""
    end = name.rpartition(".")[2]
    if end == "jsonl":
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif end == "csv":
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) for k, v in row.items()} for row in rows)
    elif end == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    else:
        pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), name)
    return name


def saved(rows: list) -> str:
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    return "saved"


def sft(tokenizer, path):
    return SFTDataset(OmegaConf.create({"path": path}), tokenizer)


def texts(tokenizer, path) -> list[str]:
    return [tokenizer.decode(sequence["token_ids"]) for sequence in sft(tokenizer, path)]


def learned(tokenizer, sequence) -> str:
    pairs = zip(sequence["token_ids"], sequence["action_mask"], strict=True)
    return tokenizer.decode([token for token, action in pairs if action])


def error_of(tokenizer, row) -> str:
    """What is wrong with a second row of this kind."""
    with pytest.raises(DataError) as caught:
        sft(tokenizer, write("bad.jsonl", [ROWS[3], row]))
    message = str(caught.value)
    assert message.startswith("data.path: bad.jsonl:2: ") and "\n" not in message
    return message.removeprefix("data.path: bad.jsonl:2: ")


# ------------------------------------------------------------------------------ nulls


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow", "a.csv", "saved"])
def test_all_kinds_of_files_give_the_same(tokenizer, kind):
    rows = [row | {"tools": [SCHEMA, OTHER]} for row in ROWS]
    expected = texts(tokenizer, write("a.jsonl", rows))
    assert '<call>search{"city": "Rome"}' in expected[0] and '{"deep": 1}' in expected[1]
    assert not any("null" in text or "None" in text for text in expected)
    path = saved(rows) if kind == "saved" else write(kind, rows)
    assert texts(tokenizer, path) == expected
    if kind != "a.csv":
        fingerprints = [load_rows(p, "data").fingerprint(range(4)) for p in (path, "a.jsonl")]
        assert fingerprints[0] == fingerprints[1]


def test_load_dataset_gives_the_same(tokenizer, tmp_path, monkeypatch):
    """Which makes a table of JSON lines, too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("hub").mkdir()
    write("hub/rows.jsonl", ROWS)
    Path("hub/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: rows.jsonl\n---\n"
    )
    assert texts(tokenizer, "train@hub:main") == texts(tokenizer, "hub/rows.jsonl")


def test_a_null_that_a_json_file_states_is_learned(tokenizer):
    calls = [call({"city": None}), call('{"city": null}')]
    (text,) = texts(tokenizer, write("a.jsonl", [{"messages": [USER, said("", tool_calls=calls)]}]))
    assert text.count('<call>search{"city": null}') == 2


def test_nulls_of_messages_are_absent_everywhere(tokenizer):
    message = said(None, tool_calls=[call({})], name=None, weight=None)
    rows = [{"messages": [USER, message], "tools": None}]
    (text,) = texts(tokenizer, write("a.jsonl", rows))
    assert text.endswith("<|im_start|>assistant\n<call>search{}<|im_end|>\n")


def test_rows_of_several_formats_in_one_table(tiny_tokenizer):
    rows = [
        {"messages": [USER, said("hello")]},
        {"prompt": "a", "response": "b"},
        {"question": "c", "answer": "#### 4"},
    ]
    names = ("messages", "prompt", "response", "question", "answer")
    table = [dict.fromkeys(names) | row for row in rows]
    expected = texts(tiny_tokenizer, write("a.jsonl", rows))
    assert texts(tiny_tokenizer, write("a.parquet", table)) == expected


def test_extra_info_of_a_table(tiny_tokenizer, caplog):
    infos = [{"answer": "1", "more": {"a": 1}}, {"answer": "2"}, {"tests": ["x", None]}, {}]
    rows = [{"prompt": "p", "extra_info": info} for info in infos]
    for path in (write("a.jsonl", rows), write("a.parquet", rows)):
        caplog.clear()
        items = RLDataset(OmegaConf.create({"path": path}), tiny_tokenizer)
        assert [item["extra_info"] for item in items] == infos
        (record,) = caplog.records
        place = "a.jsonl:3" if path == "a.jsonl" else "a.parquet: row 3"
        assert record.getMessage() == (
            f"train_data.path: 2 of 4 rows have no answer, the first at {place}; an environment "
            "that compares with one fails there"
        )


def test_maps_of_a_table():
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table({"extra_info": pyarrow.array([[("a", 1), ("b", 2)]], kind)})
    pyarrow.parquet.write_table(table, "a.parquet")
    assert list(load_rows("a.parquet", "data")) == [{"extra_info": {"a": 1, "b": 2}}]


# ------------------------------------------------------------------------------ tools


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)]])
def test_tools_are_shown(tokenizer, tools):
    row = ROWS[0] | {"tools": tools}
    expected = tokenizer.apply_chat_template(row["messages"], tools=[SCHEMA], tokenize=False)
    assert expected.startswith('tools:{"type": "function"')
    assert texts(tokenizer, write("a.jsonl", [row])) == [expected]
    (item,) = RLDataset(
        OmegaConf.create({"path": write("b.jsonl", [row | {"messages": [USER]}])}), tokenizer
    )
    assert item["prompt"] == tokenizer.apply_chat_template(
        [USER], tools=[SCHEMA], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tokenizer, tools):
    expected = texts(tokenizer, write("a.jsonl", ROWS))
    assert texts(tokenizer, write("b.jsonl", [r | {"tools": tools} for r in ROWS])) == expected


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("search", "tools is a string that is not JSON"),
        ({"a": 1}, "tools is an object; it must be a list of objects"),
        ([1], "tools[0] is a number; it must be an object"),
        ([SCHEMA, "[]"], "tools[1] is a list; it must be an object"),
    ],
)
def test_bad_tools(tokenizer, tools, problem):
    assert problem in error_of(tokenizer, {"messages": [USER], "tools": tools} | {"x": 1})


# ------------------------------------------------------------------------------ calls


@pytest.mark.parametrize("form", ["arguments", "calls", "messages", "bare"])
def test_arguments_are_encoded_once(tokenizer, form):
    arguments = {"city": "Rome", "n": [1, "2"]}
    calls = [call(json.dumps(arguments) if form == "arguments" else arguments)]
    messages = [USER, said("", tool_calls=json.dumps(calls) if form == "calls" else calls)]
    if form == "bare":
        tokenizer.chat_template = TEMPLATE.replace("c.function", "c")
        calls[0] = {"name": "search", "arguments": json.dumps(arguments)}
    row = {"messages": json.dumps(messages) if form == "messages" else messages}
    (text,) = texts(tokenizer, write("a.jsonl", [row]))
    assert '<call>search{"city": "Rome", "n": [1, "2"]}<|im_end|>' in text


def test_calls_without_arguments(tokenizer):
    calls = [call(""), call({}), {"type": "function", "function": {"name": "now"}}]
    tokenizer.chat_template = TEMPLATE.replace("arguments |", "get('arguments', {}) |")
    (text,) = texts(
        tokenizer, write("a.jsonl", [{"messages": [USER, said("x", tool_calls=calls)]}])
    )
    assert "x<call>search{}<call>search{}<call>now{}<|im_end|>" in text


def test_no_calls_are_no_field(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("'tool_calls' in m %}", "'tool_calls' in m %}CALLS")
    for calls in ([], None, "[]"):
        messages = [USER, said("x", tool_calls=calls)]
        (text,) = texts(tokenizer, write("a.jsonl", [{"messages": messages}]))
        assert "CALLS" not in text
    assert "content is empty" in error_of(tokenizer, {"messages": [USER, said("", tool_calls=[])]})


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ([call("{city: Rome}")], "tool_calls[0].function.arguments is a string that is not JSON"),
        ([call("5")], "tool_calls[0].function.arguments is a number as JSON; it must be an object"),
        ([call({}), "x"], "tool_calls[1] is a string; it must be an object"),
        ({"name": "x"}, "tool_calls is an object; it must be a list of objects"),
        ("x", "tool_calls is a string that is not JSON"),
    ],
)
def test_bad_calls(tokenizer, calls, problem):
    assert f"messages[1].{problem}" in error_of(
        tokenizer, {"messages": [USER, said("x", tool_calls=calls), TOOL, said("y")]}
    )


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("zero", [0, 0.0])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_turns_of_weight_zero_are_not_learned(tokenizer, name, zero):
    messages = [USER, said("one", weight=zero), USER, said("two"), USER, said("three", weight=1)]
    (sequence,) = sft(tokenizer, write(name, [{"messages": messages}]))
    assert learned(tokenizer, sequence) == "two<|im_end|>three<|im_end|>"
    plain = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
    assert texts(tokenizer, name) == texts(tokenizer, write("b.jsonl", [{"messages": plain}]))
    prompt = [*messages[:2], USER]
    (item,) = RLDataset(
        OmegaConf.create({"path": write("c.jsonl", [{"messages": prompt}])}), tokenizer
    )
    assert "weight" not in item["prompt"]


def test_a_greeting_that_is_not_learned_may_come_first(tokenizer):
    messages = [said("welcome", weight=0), USER, said("one")]
    (sequence,) = sft(tokenizer, write("a.jsonl", [{"messages": messages}]))
    assert learned(tokenizer, sequence) == "one<|im_end|>"


def test_nothing_but_weight_zero(tokenizer):
    row = {"messages": [USER, said("one", weight=0)]}
    with pytest.raises(DataError, match="assistant turns all have weight 0: nothing to learn"):
        sft(tokenizer, write("a.jsonl", [row]))


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0", True, [1], float("nan")])
def test_other_weights(tokenizer, weight):
    message = error_of(tokenizer, {"messages": [USER, said("x", weight=weight), USER]})
    assert message.startswith(f"messages[1].weight is {weight!r}; use 0 (the turn is not learned)")


def test_weight_of_a_turn_that_is_never_learned(tokenizer):
    message = error_of(tokenizer, {"messages": [USER | {"weight": 1}, said("x")]})
    assert "messages[0].weight is 1 in a turn of the user; only turns of the assistant" in message
    rows = [{"messages": [USER | {"weight": 0}, said("x")]}]
    assert len(sft(tokenizer, write("a.jsonl", rows))) == 1


# ------------------------------------------------------------------------------ what nobody reads


def test_columns_that_are_not_read_are_named_once(tiny_tokenizer, caplog):
    rows = [
        {"prompt": "p", "response": "r", "id": 1, "level": None},
        {"prompt": "p", "response": "r", "id": 2, "source": "web", "extra_info": {"a": 1}},
    ]
    sft(tiny_tokenizer, write("a.jsonl", rows))
    (record,) = caplog.records
    assert record.getMessage() == (
        "data.path: columns that are not read: id in 2 rows, source in 1 rows, extra_info in 1 rows"
    )
    caplog.clear()
    RLDataset(OmegaConf.create({"path": "a.jsonl"}), tiny_tokenizer)
    (record,) = caplog.records
    assert record.getMessage() == (
        "train_data.path: columns that are not read: response in 2 rows, id in 2 rows, source in 1 "
        "rows"
    )


def test_columns_of_another_format_are_not_read(tiny_tokenizer, caplog):
    sft(tiny_tokenizer, write("a.jsonl", [{"messages": [USER, said("x")], "prompt": "p"}]))
    assert "columns that are not read: prompt in 1 rows" in caplog.text
    caplog.clear()
    many = {f"column {i}": i for i in range(30)}
    sft(tiny_tokenizer, write("a.jsonl", [{"prompt": "p", "response": "r"} | many]))
    assert len(caplog.records) == 1 and "column 11 in 1 rows, and 18 more" in caplog.text


def test_what_the_template_does_not_show_is_named(tiny_tokenizer, tokenizer, caplog):
    rows = [
        {"messages": [USER, said("x", tool_calls=[call({})], thinking="hm")], "tools": [SCHEMA]},
        {"messages": [USER, said("x", weight=1)]},
    ]
    sft(tiny_tokenizer, write("a.jsonl", rows))
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("data.path: the chat template does not show: ")
    for name in ("tools", "tool_calls (of messages)", "thinking (of messages)"):
        assert f"{name} in 1 rows" in message
    assert "weight" not in message and "content" not in message
    caplog.clear()
    sft(tokenizer, "a.jsonl")
    assert caplog.messages == [
        "data.path: the chat template does not show: thinking (of messages) in 1 rows"
    ]


def test_nothing_is_said_of_rows_that_are_read_whole(tiny_tokenizer, caplog):
    sft(tiny_tokenizer, write("a.jsonl", [ROWS[3]]))
    row = {"question": "q", "answer": "#### 4"}
    RLDataset(OmegaConf.create({"path": write("b.jsonl", [row])}), tiny_tokenizer)
    assert not caplog.records
