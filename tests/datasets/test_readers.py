import csv
import datetime
import gzip
import json
import socket
import struct
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from RL2.datasets import load_rows
from RL2.runtime.errors import RL2Error
from tests.hub import hub_without

ROWS = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> str:
    with open(name, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return name


def write_rows(name: str, rows: list = ROWS) -> str:
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def error_of(path: str) -> str:
    with pytest.raises(RL2Error) as caught:
        load_rows(path, "train_data")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("train_data.path")
    return message


# ------------------------------------------------------------------------------ five file types


def test_jsonl():
    rows = load_rows(write_rows("a.jsonl"), "train_data")
    assert list(rows) == ROWS and rows.where(3) == "a.jsonl:4"


def test_json_list():
    rows = load_rows(write("a.json", json.dumps(ROWS)), "train_data")
    assert list(rows) == ROWS and rows.where(3) == "a.json:1"


def test_json_list_over_many_lines():
    rows = load_rows(write("a.json", json.dumps(ROWS, indent=2)), "train_data")
    assert list(rows) == ROWS
    assert [rows.where(i) for i in range(3)] == ["a.json:2", "a.json:6", "a.json:10"]


@pytest.mark.parametrize("n", [1, 10])
def test_json_lines_under_json(n):
    assert list(load_rows(write_rows("a.json", ROWS[:n]), "train_data")) == ROWS[:n]


def test_csv():
    text = 'question,answer\n"a, ""b""\nc",#### 1\n\nd,"#### 2"\n'
    rows = load_rows(write("a.csv", text), "train_data")
    assert list(rows) == [
        {"question": 'a, "b"\nc', "answer": "#### 1"},
        {"question": "d", "answer": "#### 2"},
    ]
    assert [rows.where(0), rows.where(1)] == ["a.csv:2", "a.csv:5"]


def test_csv_cells_of_any_size():
    limit, long = csv.field_size_limit(), "x, " * 100_000
    rows = load_rows(write("a.csv", f'question,answer\n"{long}",b\n'), "train_data")
    assert list(rows) == [{"question": long, "answer": "b"}]
    assert csv.field_size_limit() == limit  # it is the whole process's


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n", "\ufeff\r\n"])
def test_csv_of_other_delimiters(delimiter, start):
    """The header decides, so that the others may stand in cells, in a quoted name as well."""
    line = delimiter.join(["prompt", '"a, b; c"', "answer"])
    text = start + f"{line}\r\n" + delimiter.join(['"1,5; 2\t3"', "x", '"4\r\n5"']) + "\r\n"
    rows = load_rows(write("a.csv", text), "train_data")
    assert list(rows) == [{"prompt": "1,5; 2\t3", "a, b; c": "x", "answer": "4\r\n5"}]
    assert rows.where(0) == f"a.csv:{start.count(chr(10)) + 2}"
    assert list(load_rows(write("a.tsv", text), "train_data")) == list(rows)


def test_csv_of_one_column():
    rows = load_rows(write("a.csv", 'prompt\n"a;b,c"\nd;e\n'), "train_data")
    assert list(rows) == [{"prompt": "a;b,c"}, {"prompt": "d;e"}]


def test_csv_that_names_its_delimiter():
    text = "sep=;\r\nprompt;answer,comment\r\na;b\r\n"
    rows = load_rows(write("a.csv", text), "train_data")
    assert list(rows) == [{"prompt": "a", "answer,comment": "b"}] and rows.where(0) == "a.csv:3"


def gzipped(name: str, data: bytes) -> str:
    return write(f"{name}.gz", gzip.compress(data))


def test_gzipped_text():
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    rows = load_rows(gzipped("a.jsonl", b"\xef\xbb\xbf" + lines), "train_data")
    assert list(rows) == ROWS and rows.where(3) == "a.jsonl.gz:4"
    # Parts that were compressed one by one and joined.
    write("b.JSONL.GZ", gzip.compress(lines[:50]) + gzip.compress(lines[50:]))
    assert list(load_rows("train[2:4]@b.JSONL.GZ", "train_data")) == ROWS[2:4]
    assert list(load_rows(gzipped("a.json", json.dumps(ROWS).encode()), "train_data")) == ROWS
    assert list(load_rows(gzipped("a.csv", b"a;b\n1;2\n"), "train_data")) == [{"a": "1", "b": "2"}]
    # A browser unpacks a file and keeps its name, or the other way round.
    assert list(load_rows(write("c.jsonl.gz", lines), "train_data")) == ROWS
    assert list(load_rows(write("c.jsonl", gzip.compress(lines)), "train_data")) == ROWS


def test_gzipped_trouble():
    lines = json.dumps(ROWS[0]).encode()
    whole = gzip.compress(lines)
    for broken in (whole[:-9], whole[:15], whole[:20] + b"xxx" + whole[23:]):
        assert "a.jsonl.gz: does not decompress (" in error_of(write("a.jsonl.gz", broken))
    assert "the data set is empty" in error_of(gzipped("a.jsonl", b""))
    assert "a.jsonl.gz:2: " in error_of(gzipped("a.jsonl", lines + b"\n[1]\n"))
    assert "unknown file type" in error_of(gzipped("a.parquet", b"PAR1"))
    assert "unknown file type" in error_of("./" + gzipped("a", lines))


def test_parquet_in_a_folder_with_a_telling_name(tmp_path):
    (tmp_path / "run=3").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "run=3/a.parquet")
    rows = load_rows("run=3/a.parquet", "train_data")
    assert list(rows) == ROWS and rows.where(3) == "run=3/a.parquet: row 4"


def test_arrow_stream_and_file():
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream("stream.arrow", table.schema) as stream:
        stream.write_table(table)
    pyarrow.feather.write_feather(table, "file.arrow")
    for name in ("stream.arrow", "file.arrow"):
        rows = load_rows(name, "train_data")
        assert list(rows) == ROWS and rows.where(0) == f"{name}: row 1"


def test_arrow_file_of_save_to_disk():
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    assert list(load_rows("saved/data-00000-of-00001.arrow", "train_data")) == ROWS


def test_text_details():
    """Byte order mark, CRLF, and line separators inside strings."""
    row = {"question": "a\u2028b\x85c", "answer": "#### 1"}
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\r\n"
    assert list(load_rows(write("a.jsonl", text), "train_data")) == [row]


def test_rows_keep_their_own_types():
    rows = [{"prompt": "a", "extra_info": {"answer": 1}}, {"prompt": "b", "extra_info": {"x": "y"}}]
    assert list(load_rows(write_rows("a.jsonl", rows), "train_data")) == rows


# ------------------------------------------------------------------------------ path syntax


@pytest.mark.parametrize(
    ("split", "indices"),
    [
        ("train", range(10)),
        ("whatever", range(10)),
        ("train[:3]", range(3)),
        ("train[-2:]", (8, 9)),
        ("train[20%:40%]", (2, 3)),
        ("train[:1]+train[8:]", (0, 8, 9)),
        ("train[5:500]", range(5, 10)),
    ],
)
@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_split_of_a_file(split, indices, extension):
    write_rows("a.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "a.parquet")
    rows = load_rows(f"{split}@a.{extension}", "train_data")
    assert list(rows) == [ROWS[i] for i in indices]
    last = indices[-1] + 1
    places = {"jsonl": f"a.jsonl:{last}", "parquet": f"a.parquet: row {last}"}
    assert rows.where(len(rows) - 1) == places[extension]


@pytest.mark.parametrize("name", ["me@home.jsonl", "a:b.jsonl", "a b.JSONL"])
def test_file_names_with_signs(name):
    write_rows(name)
    assert list(load_rows(name, "train_data")) == ROWS
    assert list(load_rows(f"train[:2]@{name}", "train_data")) == ROWS[:2]


@pytest.mark.parametrize("folder", ["jane@example", "a@b@c", "test@x", "x=1/~y", "a:b", "[a]*?"])
def test_folders_with_signs(tmp_path, folder):
    Path(folder).mkdir(parents=True)
    write_rows(f"{folder}/rows.jsonl")
    for name in (f"{folder}/rows.jsonl", f"{tmp_path}/{folder}/rows.jsonl", folder):
        assert list(load_rows(name, "train_data")) == ROWS
        assert list(load_rows(f"train@{name}", "train_data")) == ROWS
        assert list(load_rows(f"train[1:3]@{name}", "train_data")) == ROWS[1:3]


def parts_of(path: str) -> list[list[int]]:
    """Numbers of the rows, by the file that they come from."""
    rows, parts = load_rows(path, "train_data"), {}
    for i, row in enumerate(rows):
        parts.setdefault(rows.where(i).rpartition(":")[0], []).append(row["n"])
    return list(parts.values())


def write_parts(*names: str) -> None:
    """Two rows in each file: 0 and 1, 2 and 3, and so on."""
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"n": 2 * i}, {"n": 2 * i + 1}]
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            write(name, gzip.compress(data) if name.endswith(".gz") else data)


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "parquet"])
def test_folder_of_shards(extension):
    write_parts(*(f"shards/part-{i:05}.{extension}" for i in range(3)))
    write("shards/_SUCCESS", "")
    write("shards/.part-00000.crc.jsonl", "x")
    write("shards/README.md", "about")
    for path in ("shards", "./shards/", "train@shards", "whatever@./shards"):
        rows = load_rows(path, "train_data")
        assert [row["n"] for row in rows] == list(range(6))
    unit = "" if extension.startswith("jsonl") else " row "
    assert rows.where(3) == f"./shards/part-00001.{extension}:{unit}2".removeprefix("./")
    assert [row["n"] for row in load_rows("train[1:4]@shards", "train_data")] == [1, 2, 3]


def test_pattern_of_files():
    write_parts("d/a-0.jsonl", "d/a-1.jsonl", "d/b-0.jsonl", "d/e/a-2.jsonl")
    assert parts_of("d/*.jsonl") == [[0, 1], [2, 3], [4, 5]]
    assert parts_of("train@d/a-?.jsonl") == [[0, 1], [2, 3]]
    assert parts_of("train[1:3]@d/a-[0-9].jsonl") == [[1], [2]]
    assert parts_of("d/**/a-*.jsonl") == [[0, 1], [2, 3], [6, 7]]
    assert "train_data.path=d/c*.jsonl: no such file" in error_of("d/c*.jsonl")
    write("d/notes.txt", "x")
    assert "d/notes.txt has an unknown file type" in error_of("d/*")


def test_split_of_a_folder():
    write_parts(
        "hub/data/train-00000-of-00002-a1b2c3.jsonl", "hub/data/train-00001-of-00002-d4e5f6.jsonl",
        "hub/data/test-00000-of-00001.jsonl", "hub/data/train_sft-00000-of-00001.jsonl",
    )  # fmt: skip
    assert parts_of("train@hub") == [[0, 1], [2, 3]]
    assert parts_of("test@hub") == [[4, 5]]
    assert parts_of("train_sft@hub") == [[6, 7]]
    message = error_of("hub")
    assert message.endswith("the folder holds the splits test, train; say which one: train@hub")
    message = error_of("validation@hub")
    assert (
        "no file in the folder is of the split validation" in message and "test, train" in message
    )
    assert "give only one split of a folder" in error_of("train+test@hub")
    write_parts("dirs/train/0.jsonl", "dirs/dev/0.jsonl", "dirs/math/0.jsonl")
    assert parts_of("train@dirs") == [[0, 1]] and parts_of("validation@dirs") == [[2, 3]]
    assert parts_of("math@dirs") == [[4, 5]]
    write_parts("plain/math.train.jsonl", "plain/code.train.jsonl", "plain/math.eval.jsonl")
    assert parts_of("train@plain") == [[2, 3], [0, 1]] and parts_of("test@plain") == [[4, 5]]
    assert parts_of("plain/math*") == [[4, 5], [0, 1]]


def test_folder_of_one_rows_twice():
    write_parts("twice/a.jsonl", "twice/a.jsonl.gz")
    message = error_of("twice")
    assert "holds .jsonl and .jsonl.gz files" in message and "twice/*.jsonl" in message
    assert parts_of("twice/*.jsonl") == [[0, 1]]


def test_folder_of_save_to_disk():
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk("saved", num_shards=2)
    assert list(load_rows("saved", "train_data")) == ROWS
    splits = datasets.DatasetDict({"train": whole, "test": whole.select(range(3))})
    splits.save_to_disk("splits")
    assert list(load_rows("train@splits", "train_data")) == ROWS
    assert list(load_rows("test@splits", "train_data")) == ROWS[:3]


def test_empty_shards_are_none():
    write_parts("d/a.jsonl")
    write("d/b.jsonl", "")
    assert parts_of("d") == [[0, 1]]
    write("e.jsonl", "\n")
    assert "the data set is empty" in error_of("e*.jsonl")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows("a.jsonl")
    assert len(load_rows("~/a.jsonl", "train_data")) == 10
    assert len(load_rows("train@~/a.jsonl", "train_data")) == 10


def test_name_with_config_by_load_dataset(tmp_path, monkeypatch):
    """The same call as for the hub, on a local folder, which load_dataset takes as well."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner" / "name" / "socratic").mkdir(parents=True)
    write_rows("owner/name/socratic/train.jsonl")
    write(
        "owner/name/README.md",
        "---\nconfigs:\n- config_name: main\n  data_files: main.jsonl\n"
        "- config_name: socratic\n  data_files: socratic/train.jsonl\n---\n",
    )
    write_rows("owner/name/main.jsonl", ROWS[:1])
    rows = load_rows("train[:4]@owner/name:socratic", "train_data")
    assert list(rows) == ROWS[:4]
    assert rows.where(1) == "train[:4]@owner/name:socratic: row 2"
    message = error_of("test@owner/name:socratic")
    assert "'owner/name' does not load" in message and "check name, config and split" in message
    assert len(load_rows(f"train@{tmp_path}/owner/name:main", "train_data")) == 1
    assert "'socrates'" in error_of("train@owner/name:socrates")


# ------------------------------------------------------------------------------ errors


def test_a_path_that_names_no_rows():
    """What is wrong with a path is said in one place: `tests/config/test_data_paths.py`."""
    Path("data").mkdir()
    assert "no such file" in error_of("train@no.jsonl")
    assert "data is a folder, not a file" in error_of("data")
    assert "has an unknown file type" in error_of(write("a.txt", "x"))
    assert "nor split@name:config" in error_of("train@a/b/c")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n\n"),
        ("a.json", "\n"),
        ("a.json", " []\n"),
        ("a.csv", "\n"),
        ("a.csv", "question,answer\n"),
    ],
)
def test_empty(name, text):
    assert "the data set is empty" in error_of(write(name, text))


def test_empty_tables():
    table = pyarrow.table({"question": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, "a.parquet")
    assert "the data set is empty" in error_of("a.parquet")


def test_empty_slice():
    write_rows("a.jsonl")
    assert "the data set is empty" in error_of("train[10:]@a.jsonl")
    assert "the data set is empty" in error_of("train[5:2]@a.jsonl")


@pytest.mark.parametrize("split", ["train[x]", "train[1:2:3]", "train[:200%]", "train[3]"])
def test_bad_slice(split):
    write_rows("a.jsonl")
    message = error_of(f"{split}@a.jsonl")
    assert f"cannot read the slice '{split}'" in message and "train[:100]" in message


@pytest.mark.parametrize(
    "line", ['{"question": ', "{'a': 1}", "nonsense", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_jsonl_line_that_is_not_json(line):
    text = json.dumps(ROWS[0]) + "\n\n" + line + "\n"
    message = error_of(write("a.jsonl", text))
    assert "a.jsonl:3" in message and "not JSON" in message and '"question"' in message


@pytest.mark.parametrize("line", ["[1]", "5", "null", '"text"'])
def test_row_that_is_no_object(line):
    message = error_of(write("a.jsonl", json.dumps(ROWS[0]) + "\n" + line))
    assert "a.jsonl:2: a row is an object, this is" in message
    message = error_of(write("a.json", f'[{{"a": 1}},\n\n{line}]'))
    assert "a.json:3: a row is an object, this is" in message


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('[{"a": 1},\n {"b": }]', "a.json:2:8", "Expecting value"),
        ('[{"a": 1}\n {"b": 2}]', "a.json:2:2", "expected ',' or ']'"),
        ('[{"a": 1},\n', "a.json:2:1", "Expecting value"),
        ('[{"a": 1}', "a.json:1:10", "expected ',' or ']'"),
        ('[{"a": 1}]\n x', "a.json:2:2", "after the closing"),
        ("[\n" + "[" * 100_000, "a.json:2:1", "recursion"),
    ],
)
def test_json_list_that_is_not_json(text, place, reason):
    message = error_of(write("a.json", text))
    assert place in message and reason in message


def test_json_with_an_object_on_top():
    message = error_of(write("a.json", json.dumps({"train": ROWS}, indent=1)))
    assert "the top level is an object with keys ['train']" in message
    assert "the top level is 5" in error_of(write("a.json", "5"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_bad_utf8(name, mark):
    message = error_of(write(name, mark + b'{"a": "x"}\n{"a": "\xff"}\n'))
    assert f"{name}:2:8: byte 0xff at offset {18 + len(mark)} is not UTF-8" in message


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("question,answer\na,b\nc\n", "a.csv:3", "1 cells where the header names 2"),
        ("question,answer\na,b,c\n", "a.csv:2", "3 cells where the header names 2"),
        ('question,answer\na,"b\nc\n', "a.csv:2", "unexpected end of data"),
        ('question,answer\na,"b"c\n', "a.csv:2", "expected after"),
        ('question,answer\n\na,"' + "x" * 140_000, "a.csv:3", "use .jsonl"),
        ("question;answer\na;b;c\n", "a.csv:2", "quote cells that hold semicolons"),
        ("answer,answer\na,b\n", "a.csv:1", "occurs twice"),
    ],
)
def test_csv_trouble(text, place, reason):
    message = error_of(write("a.csv", text))
    assert f"{place}: " in message and reason in message


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("data", [b"no table at all", b"ARROW1\0\0rest", b"PAR1 rest PAR1"])
def test_broken_tables(name, data):
    message = error_of(write(name, data))
    assert name in message and ("not a" in message or "cannot be read" in message)


def test_truncated_parquet():
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "a.parquet")
    with open("a.parquet", "rb") as file:
        data = file.read()
    assert "a.parquet" in error_of(write("a.parquet", data[: len(data) // 2]))


def test_hub_in_offline_mode():
    """Offline mode of the hub's own library: what conftest.py sets."""
    message = error_of("train@openai/no-such-set-cached:main")
    assert "cannot reach the Hugging Face hub for data set 'openai/no-such-set-cached'" in message
    assert "train_data.path=FILE.jsonl" in message


def test_hub_refuses_the_connection(monkeypatch):
    """A real connection to a port where nobody listens: the error comes without retries."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    message = error_of("train@openai/no-such-set-cached")
    assert "cannot reach the Hugging Face hub" in message and "OfflineMode" not in message


def test_hub_has_no_such_data_set(monkeypatch):
    with hub_without(monkeypatch, "RepoNotFound"):
        message = error_of("train@openai/gsm9k")
    assert "the hub has no data set 'openai/gsm9k'" in message and "hf auth login" in message


# ------------------------------------------------------------------------------ silent damage


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_twice(name):
    inner = '{"prompt": "x", "extra_info": {"answer": 1, "answer": 2}}'
    write(name, f"[{inner}]" if name == "a.json" else f'{{"prompt": "y"}}\n{inner}\n')
    message = error_of(name)
    assert "the key 'answer' occurs twice in one object" in message
    assert message.startswith(f"train_data.path: {name}:{1 if name == 'a.json' else 2}")


def test_columns_twice():
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["x"]), pyarrow.array(["y"])], names=["prompt", "prompt"]
    )
    pyarrow.parquet.write_table(table, "a.parquet")
    assert error_of("a.parquet").endswith("the column prompt occurs twice; rename or drop one")


def test_places_are_bytes():
    write("a.jsonl", '{"é": 1,}\n')
    assert ":1:10: not JSON" in error_of("a.jsonl")
    write("a.json", '[\n{"é": 1},]')
    assert ":2:11: not JSON" in error_of("a.json")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bytes_in_a_table_that_are_no_text(name):
    offsets, data = pyarrow.py_buffer(struct.pack("<ii", 0, 3)), pyarrow.py_buffer(b"a\xe9b")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, data])
    table = pyarrow.Table.from_arrays([column], names=["prompt"])
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, name)
    else:
        with pyarrow.ipc.new_file(name, table.schema) as writer:
            writer.write_table(table)
    message = error_of(name)
    assert "Invalid UTF8" in message and "write it again with text in UTF-8" in message


def test_dates_that_python_does_not_have():
    table = pyarrow.table({"prompt": ["x"], "when": pyarrow.array([2**62], pyarrow.timestamp("s"))})
    with (
        pyarrow.OSFile("a.arrow", "wb") as file,
        pyarrow.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    assert "its values cannot be read" in error_of("a.arrow")


def test_arrow_stream_cut_between_batches():
    table = pyarrow.table({"prompt": [str(i) for i in range(8)]})
    with (
        pyarrow.OSFile("a.arrow", "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=4)
    whole = Path("a.arrow").read_bytes()
    assert len(load_rows("a.arrow", "train_data")) == 8
    Path("a.arrow").write_bytes(whole[:-8])
    assert "it ends without the end mark: it was cut off" in error_of("a.arrow")


# ------------------------------------------------------------------------------ the same rows?


def test_fingerprint_is_of_the_content():
    def fingerprint(path, indices=range(10)):
        return load_rows(path, "train_data").fingerprint(indices)

    expected = fingerprint(write_rows("a.jsonl"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "a.parquet")
    turned = [dict(reversed(row.items())) for row in ROWS]
    for path in ("a.parquet", write_rows("b.jsonl", turned), "train[:10]@a.jsonl"):
        assert fingerprint(path) == expected
    others = [
        fingerprint("a.jsonl", range(9)),
        fingerprint(write_rows("c.jsonl", [*ROWS[:9], ROWS[9] | {"more": None}])),
        fingerprint(write_rows("d.jsonl", [ROWS[1], ROWS[0], *ROWS[2:]])),
    ]
    assert len({expected, *others}) == 4


def test_fingerprint_of_what_json_does_not_have():
    rows = [{"prompt": "a", "when": datetime.date(2026, 1, 2), "raw": b"\xff"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    one, same = (load_rows("a.parquet", "train_data").fingerprint([0]) for _ in range(2))
    assert one == same
