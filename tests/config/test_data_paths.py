import errno
import os

import pytest

from RL2.config.data_paths import extension_of, find_data, is_data_file, split_data_path
from RL2.runtime.errors import ConfigError


def check(path: str) -> str | None:
    """What is wrong with it."""
    try:
        find_data("train_data", path)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(f"train_data.path={path}: ")
        return str(error).removeprefix(f"train_data.path={path}: ")


@pytest.fixture
def jane(workdir):
    folder = workdir / "jane@example" / "a@b"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize("split", ["", "train@", "train[:10]@", "a[1:]+a[:1]@"])
@pytest.mark.parametrize("name", ["rows.jsonl", "", "*.jsonl"])
def test_a_folder_with_at(workdir, jane, split, name):
    for start in (f"{jane}/", "jane@example/a@b/", "./jane@example/a@b/"):
        path = f"{start}{name}"
        assert split_data_path(f"{split}{path}") == (split[:-1] or None, path)
        assert check(f"{split}{path}") is None
    assert check(f"{split}{jane}/no.jsonl") == "no such file; give an existing file"
    missing = check(f"{split}jane@example/no.jsonl")
    assert missing == f"no such file in {workdir}; give an existing file"


def test_a_file_with_at_wins_over_a_split(workdir, jane):
    (workdir / "train@rows.jsonl").write_text("{}\n")
    assert split_data_path("train@rows.jsonl") == (None, "train@rows.jsonl")
    assert split_data_path("test@train@rows.jsonl") == ("test", "train@rows.jsonl")
    assert split_data_path("test@rows.jsonl") == ("test", "rows.jsonl")


@pytest.mark.parametrize("end", "jsonl json csv tsv parquet arrow csv.gz JSONL.GZ".split())
def test_file_types(workdir, end):
    name = f"a.{end}"
    (workdir / name).write_text("x")
    assert is_data_file(name) and check(name) is None and check(f"train@{name}") is None
    (workdir / name).write_text("")
    assert check(name) == "the file is empty; give one with rows"


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.parquet.gz", "a.jsonl.zst", "a"])
def test_other_types(workdir, name):
    (workdir / name).write_text("x")
    assert not is_data_file(name)
    assert "has an unknown file type; use .jsonl, .json, .csv" in check(f"./{name}")
    assert "also with .gz" in check(f"./{name}")


def test_extension():
    assert extension_of("a.b.jsonl.gz") == ".jsonl.gz" and extension_of("a.tar.GZ") == ".tar.gz"
    assert extension_of("a.b/c") == "" and extension_of("a.gz") == ".gz"


def test_folders(workdir):
    (workdir / "data" / "train").mkdir(parents=True)
    assert "data is a folder, not a file, and holds no data files (" in check("data")
    for name in ("data/train/a.jsonl", "data/test.jsonl"):
        (workdir / name).write_text("{}\n")
    assert check("data") == "the folder holds the splits test, train; say which one: train@data"
    assert check("train@data") is None
    assert check("val@data") == (
        "no file in the folder is of the split val; by their names there are test, train"
    )
    (workdir / "data" / "README.md").write_text("---\nconfigs:\n- config_name: main\n---\n")
    assert check("data") == "is a folder of several splits; say which: train@data"
    assert check("train@data") is None and check("train@data:main") is None


def test_the_hub_is_not_asked():
    for path in ("train@openai/gsm8k:main", "train@gsm8k", "train[:3]@a/b.c-d"):
        assert check(path) is None
    for path in ("openai/gsm8k", "gsm8k:main", "train@a/b/c", "tr ain@a/b", "a@b@c", ""):
        assert check(path).startswith("neither a file or folder (")
    for path, ends in (("openai/gsm8k", "[:config]'"), ("openai/gsm8k:main", "'")):
        way_out = f"; a data set on the hub needs its split: train_data.path='train@{path}{ends}"
        assert check(path).endswith(way_out)
    assert check("a@b@c").endswith("such as train@openai/gsm8k:main")


def test_a_folder_that_cannot_be_walked(workdir, monkeypatch):
    """As parts of /proc are, which a path such as / comes to."""

    def refused(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "scandir", refused)
    assert check("./") == (
        "cannot be accessed (Invalid argument); give a file or folder that can be read"
    )
