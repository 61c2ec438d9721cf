import copy
import csv
import json
import math
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from RL2.datasets import RLDataset, make_loader
from RL2.datasets.prompts import GSM8K_INSTRUCTION
from RL2.environments.messages import pickled, unpickled
from RL2.runtime.errors import DataError

REAL = Path(__file__).parents[3] / "shared/data/gsm8k"
GSM8K = {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plain_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def write(rows: list, name: str = "rows.jsonl") -> str:
    # A blank line after each row: places must be physical lines all the same.
    Path(name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return name


def load(tokenizer, path, key="train_data", max_prompt_length=None, **config) -> RLDataset:
    return RLDataset(OmegaConf.create({"path": path, **config}), tokenizer, key, max_prompt_length)


def error_of(tokenizer, rows: list, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(tokenizer, write(rows), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------ row formats


def test_gsm8k_row(tiny_tokenizer):
    dataset = load(tiny_tokenizer, write([GSM8K]))
    prompt = f"<|im_start|>user\nHow many? {GSM8K_INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    assert len(dataset) == 1
    assert dataset[0] == {
        "prompt": prompt,
        "prompt_ids": tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"],
        "extra_info": {"answer": "2"},
        "index": 0,
    }
    assert tiny_tokenizer.decode(dataset[0]["prompt_ids"]) == prompt
    assert "`#### answer`" in GSM8K_INSTRUCTION


def test_gsm8k_row_without_chat_template(plain_tokenizer):
    dataset = load(plain_tokenizer, write([GSM8K]))
    assert dataset[0]["prompt"] == f"How many?\n{GSM8K_INSTRUCTION}\n"


def test_last_mark_counts(tiny_tokenizer):
    row = {"question": "q", "answer": "#### 1\n#### 1,000 "}
    assert load(tiny_tokenizer, write([row]))[0]["extra_info"] == {"answer": "1,000"}


def test_messages_row(tiny_tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    dataset = load(tiny_tokenizer, write([{"messages": messages, "extra_info": {"answer": "42"}}]))
    assert dataset[0]["prompt"] == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dataset[0]["extra_info"] == {"answer": "42"}


def test_messages_row_without_chat_template(plain_tokenizer):
    one = [{"role": "user", "content": "u"}]
    assert load(plain_tokenizer, write([{"messages": one}]))[0]["prompt"] == "u\n"
    message = error_of(plain_tokenizer, [{"messages": one * 2}])
    assert "rows.jsonl:1: messages need a tokenizer with a chat template" in message


def test_prompt_row(tiny_tokenizer):
    rows = [
        {"prompt": "Add 1 and 1: ", "extra_info": {"answer": 2, "kind": ["sum"]}},
        {"prompt": "p", "answer": "3"},
        {"prompt": "p"},
    ]
    dataset = load(tiny_tokenizer, write(rows))
    assert dataset[0]["prompt"] == "Add 1 and 1: "
    assert dataset[0]["prompt_ids"] == tiny_tokenizer("Add 1 and 1: ")["input_ids"]
    infos = [item["extra_info"] for item in dataset]
    assert infos == [{"answer": 2, "kind": ["sum"]}, {"answer": "3"}, {}]


def test_bos_stands_once(tiny_tokenizer):
    """A tokenizer that adds a BOS by itself, and a template that writes it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert tokenizer("x")["input_ids"][0] == bos[1]
    ids = load(tokenizer, write([GSM8K]))[0]["prompt_ids"]
    assert ids[0] == bos[1] != ids[1]


def test_csv_columns(tiny_tokenizer):
    def write_csv(*columns: str, rows: list[list[str]]) -> str:
        with open("rows.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        return "rows.csv"

    path = write_csv("question", "answer", rows=[["How many?", "1 + 1 = 2\n#### 2"]])
    assert load(tiny_tokenizer, path)[0] == load(tiny_tokenizer, write([GSM8K]))[0]
    path = write_csv("prompt", "extra_info", rows=[["p", '{"answer": "2"}'], ["p", ""]])
    assert [item["extra_info"] for item in load(tiny_tokenizer, path)] == [{"answer": "2"}, {}]
    path = write_csv("prompt", "answer", rows=[["p", "2"]])
    assert load(tiny_tokenizer, path)[0]["extra_info"] == {"answer": "2"}
    messages = [{"role": "user", "content": "a, b"}]
    path = write_csv("messages", "answer", rows=[[json.dumps(messages), "2"]])
    assert "a, b<|im_end|>" in load(tiny_tokenizer, path)[0]["prompt"]
    path = write_csv("question", "answer", rows=[["q", "#### 1"], ["q", ""]])
    with pytest.raises(DataError, match=r"rows.csv:3: answer is empty"):
        load(tiny_tokenizer, path)


def test_parquet_rows(tiny_tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "u"}], "extra_info": {"answer": "1"}},
        {"messages": [{"role": "user", "content": "v", "name": "x"}], "extra_info": None},
    ]
    schema = pyarrow.schema(
        {
            "messages": pyarrow.list_(
                pyarrow.struct({n: pyarrow.string() for n in ("role", "content", "name")})
            ),
            "extra_info": pyarrow.struct({"answer": pyarrow.string()}),
        }
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), "rows.parquet")
    dataset = load(tiny_tokenizer, "rows.parquet")
    assert [item["extra_info"] for item in dataset] == [{"answer": "1"}, {}]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet: row 1: row without question"):
        load(tiny_tokenizer, "rows.parquet")


# ------------------------------------------------------------------------------ the data set


def test_items_are_copies(tiny_tokenizer):
    dataset = load(tiny_tokenizer, write([{"prompt": "p", "extra_info": {"turns": []}}]))
    dataset[0]["extra_info"]["turns"].append(1)
    dataset[0]["extra_info"]["new"] = 1
    assert dataset[0]["extra_info"] == {"turns": []}


def test_max_examples(tiny_tokenizer, gsm8k_rows_file):
    dataset = load(tiny_tokenizer, gsm8k_rows_file, key="test_data", max_examples=5)
    assert [item["index"] for item in dataset] == [0, 1, 2, 3, 4]
    assert "Ann has 4 apples" in dataset[4]["prompt"]
    assert len(load(tiny_tokenizer, gsm8k_rows_file, max_examples=500)) == 32
    assert len(load(tiny_tokenizer, gsm8k_rows_file, max_examples=None)) == 32


def test_no_path_for_environments_that_make_prompts(tiny_tokenizer):
    dataset = load(tiny_tokenizer, None, prompts_per_rollout=3)
    assert [item for item in dataset] == [{"extra_info": {}, "index": i} for i in range(3)]
    assert len(list(make_loader(dataset, 3, seed=0))) == 1


def test_loader_gives_lists_of_items(tiny_tokenizer, gsm8k_rows_file):
    dataset = load(tiny_tokenizer, gsm8k_rows_file)
    batch = next(iter(make_loader(dataset, 8, seed=0)))
    assert len(batch) == 8 and all(item == dataset[item["index"]] for item in batch)
    with pytest.raises(DataError, match=r"train_data.prompts_per_rollout=64: .* only 32 rows"):
        make_loader(dataset, 64, seed=0)


# ------------------------------------------------------------------------------ overlong prompts

MIXED = [{"prompt": "x" * n} for n in (3, 12, 5, 20)]


def test_overlong_is_an_error(tiny_tokenizer):
    message = error_of(tiny_tokenizer, MIXED, max_prompt_length=10)
    assert message == (
        "train_data.max_prompt_length=10: 2 of 4 prompts are longer (longest 20 tokens, first at "
        "rows.jsonl:3); raise actor.max_length_per_device up to the model's context (or "
        "train_data.max_prompt_length if it is set), or set train_data.overlong=drop"
    )


def test_limit_of_the_config(tiny_tokenizer):
    assert "max_prompt_length=19: 1 of 4" in error_of(tiny_tokenizer, MIXED, max_prompt_length=19)
    path = write(MIXED)
    with pytest.raises(DataError, match="test_data.max_prompt_length=4: 3 of 4"):
        config = OmegaConf.create({"path": path, "max_prompt_length": 4})
        RLDataset(config, tiny_tokenizer, "test_data")
    assert len(load(tiny_tokenizer, path, max_prompt_length=20)) == 4


def test_overlong_dropped(tiny_tokenizer, caplog):
    with caplog.at_level("INFO", logger="RL2"):
        dataset = load(tiny_tokenizer, write(MIXED), max_prompt_length=10, overlong="drop")
    assert [item["prompt"] for item in dataset] == ["xxx", "xxxxx"]
    assert [item["index"] for item in dataset] == [0, 1]
    (record,) = caplog.records
    assert "2 of 4 prompts are longer" in record.getMessage() and "dropped" in record.getMessage()


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_all_overlong_is_an_error(tiny_tokenizer, overlong):
    message = error_of(tiny_tokenizer, MIXED, max_prompt_length=2, overlong=overlong)
    assert "all 4 of 4 prompts are longer" in message and "overlong=drop" not in message


# ------------------------------------------------------------------------------ bad rows

USER = [{"role": "user", "content": "u"}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a", "label": 1}, "row without question: it has the keys label, text; a row is"),
        ({}, "row without question: it has the keys none; a row is"),
        ({"answer": "#### 1"}, "row without question: it has the keys answer;"),
        ({"question": "q"}, "row without answer: it has the keys question;"),
        ({"question": None, "answer": "#### 1"}, "question is null"),
        ({"question": "", "answer": "#### 1"}, "question is empty"),
        ({"question": " \n", "answer": "#### 1"}, "question is empty"),
        ({"question": 5, "answer": "#### 1"}, "question is a number"),
        ({"question": "q", "answer": None}, "answer is null"),
        ({"question": "q", "answer": float("nan")}, "answer is NaN"),
        ({"question": "q", "answer": ""}, "answer is empty"),
        ({"question": "q", "answer": 5}, "answer is a number"),
        ({"question": "q", "answer": ["#### 5"]}, "answer is a list"),
        ({"question": "q", "answer": "5"}, "answer without '####'"),
        ({"question": "q", "answer": "5 #### "}, "answer has nothing after its last '####'"),
        ({"question": "\ud800", "answer": "#### 5"}, "question contains half a surrogate pair"),
        ({"prompt": None}, "prompt is null"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": ["p"]}, "prompt is a list"),
        ({"prompt": "p", "answer": None}, "answer is null"),
        ({"prompt": "p", "answer": float("nan")}, "answer is NaN"),
        ({"prompt": "p", "extra_info": {"answer": ""}}, "answer is empty"),
        ({"prompt": "p", "answer": float("inf")}, "answer is infinite"),
        ({"prompt": "p", "answer": "NaN"}, "answer is NaN"),
        ({"prompt": "p", "answer": []}, "answer is empty"),
        ({"prompt": "p", "answer": ["1", float("nan")]}, "answer is NaN"),
        ({"prompt": "p", "answer": "\ud800"}, "answer contains half a surrogate pair"),
        ({"question": "q", "answer": "#### nan"}, "answer is NaN"),
        ({"messages": [{"role": "usr", "content": "u"}]}, "messages[0].role is 'usr', which"),
        ({"prompt": "p", "extra_info": ["2"]}, "extra_info is a list; it must be an object"),
        ({"prompt": "p", "extra_info": 2}, "extra_info is a number; it must be an object"),
        ({"prompt": "p", "extra_info": "{2"}, "extra_info is a string that is not JSON"),
        ({"messages": None}, "messages is null; it must be a list"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": {"role": "user"}}, "messages is an object; it must be a list"),
        ({"messages": "hello"}, "messages is a string that is not JSON"),
        ({"messages": '"hello"'}, "messages is a string; it must be a list"),
        ({"messages": ["hello"]}, "messages[0] is a string; it must be an object"),
        ({"messages": [{"content": "u"}]}, "messages[0] without role: it has the keys content"),
        ({"messages": [*USER, {"role": "user"}]}, "messages[1] without content: it has the keys"),
        ({"messages": [{"role": None, "content": "u"}]}, "messages[0].role is null"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null"),
        ({"messages": [{"role": "user", "content": ["u"]}]}, "messages[0].content is a list"),
        (
            {"messages": [*USER, {"role": "assistant", "content": "a"}]},
            "end with an assistant turn",
        ),
    ],
)
def test_bad_row_is_named(tiny_tokenizer, row, problem):
    message = error_of(tiny_tokenizer, [GSM8K, row, GSM8K])
    assert message.startswith("train_data.path: rows.jsonl:3: ") and problem in message
    if "it has the keys" in problem and "messages" not in problem:
        assert '{"messages", "extra_info"}, {"prompt", "extra_info"}' in message


def test_what_the_template_refuses(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = error_of(tokenizer, [{"messages": USER}])
    assert "rows.jsonl:1: the chat template rejects the messages: roles must alternate" in message
    tokenizer.chat_template = "{{ '\\ud800' }}{{ messages[-1].content }}{{ '\\ud800' }}"
    message = error_of(tokenizer, [{"messages": USER}])
    assert "rows.jsonl:1: the chat template rejects the messages: " in message
    assert "surrogates not allowed" in message


def test_a_template_that_is_no_good(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    for template in ("{{ 1 / 0 }}", "{% for", "{{ ''.__class__.__mro__ }}"):
        tokenizer.chat_template = template
        assert "the chat template rejects" in error_of(tokenizer, [{"messages": USER}])


def test_prompt_without_tokens(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ '' }}"
    message = error_of(tokenizer, [{"messages": USER}])
    assert "rows.jsonl:1: the tokenizer gives no token for the prompt" in message


def test_bad_row_of_a_slice_keeps_its_line(tiny_tokenizer):
    path = write([GSM8K, GSM8K, {"question": "q"}])
    with pytest.raises(DataError, match="rows.jsonl:5: row without answer"):
        load(tiny_tokenizer, f"train[1:]@{path}")
    assert len(load(tiny_tokenizer, f"train[:2]@{path}")) == 2


# ------------------------------------------------------------------------------ real data


@pytest.mark.skipif(not REAL.is_dir(), reason="the GSM8K files do not lie beside the checkout")
def test_real_gsm8k_is_read_and_checked_fast(tiny_tokenizer):
    start = time.perf_counter()
    items = load(tiny_tokenizer, str(REAL / "train.jsonl"))
    assert time.perf_counter() - start < 12.0  # measured: 2 s, tokens of a byte each included
    assert len(items) == 7473
    assert all(item["extra_info"]["answer"].lstrip("-")[0].isdigit() for item in items)
    dataset = load(tiny_tokenizer, str(REAL / "test.jsonl"), max_examples=100)
    assert len(dataset) == 100 and dataset[0]["extra_info"] == {"answer": "18"}


# ------------------------------------------------------------------------------ for the environment


def nested(levels: int) -> dict:
    value = {"n": 1}
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("extra_info", "said"),
    [
        ({"file": "x" * 5000}, "extra_info is 50"),
        (nested(101), "extra_info is nested more than 200 levels deep"),
        (nested(450), "extra_info is nested more than 200 levels deep"),
    ],
)
def test_a_row_that_cannot_go_to_the_environment(plain_tokenizer, extra_info, said):
    path = write([{"prompt": "a"}, {"prompt": "b", "extra_info": extra_info}])
    with pytest.raises(DataError) as caught:
        RLDataset(OmegaConf.create({"path": path}), plain_tokenizer, max_extra_info=4096)
    message = str(caught.value)
    assert message.startswith(f"train_data.path: rows.jsonl:3: {said}") and "\n" not in message
    if "file" in extra_info:
        assert "4096" in message and message.endswith("or use rollout.env_workers=0")
        load(plain_tokenizer, path)  # without processes there is no limit


@pytest.mark.parametrize("levels", [150, 700, 900, 980, 5000])
def test_an_answer_that_python_cannot_recurse_into(plain_tokenizer, levels):
    deep = "[" * levels + "1" + "]" * levels
    Path("rows.jsonl").write_text(f'{{"prompt": "b", "extra_info": {{"answer": {deep}}}}}')
    if levels == 150:
        assert load(plain_tokenizer, "rows.jsonl")[0]["extra_info"]
        return
    with pytest.raises(DataError, match=r"^train_data.path: rows.jsonl:1: .*(nested|recursion)"):
        load(plain_tokenizer, "rows.jsonl")


def test_what_goes_to_the_environment_as_it_is(plain_tokenizer):
    odd = {"n": 2**70, "x": [math.inf, None], "half": "\ud800", "nul": "a\0b", "many": "]}" * 300}
    odd |= {"deep": nested(98), "keys": {str(n): [] for n in range(300)}}
    path = write([{"prompt": "a", "extra_info": odd}])
    dataset = RLDataset(OmegaConf.create({"path": path}), plain_tokenizer, max_extra_info=2**20)
    assert dataset[0]["extra_info"] == odd
    assert unpickled(pickled(dataset[0]["extra_info"])) == odd
