"""Trackers by name: each package is really run, and a new sink is a module and a line."""

import json
import sqlite3
from importlib.util import find_spec

import pytest

from RL2.runtime.errors import ConfigError
from RL2.trainer.sinks import registry
from RL2.trainer.sinks.metrics import Metrics
from tests.docs import example
from tests.trainer.sinks.support import config_of
from tests.trainer.support import rows_of

CANARY = "canary0123456789abcdef0123456789"


def tensorboard_rows(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}  # fmt: skip


def trackio_rows(folder):
    (file,) = folder.glob("trackio/*.db")
    rows = sqlite3.connect(file).execute("select run_id, step, metrics from metrics order by id")
    runs, steps, metrics = zip(*rows, strict=True)
    assert len({*runs}) == 1
    found = {}
    for step, row in zip(steps, map(json.loads, metrics), strict=True):
        for name, value in row.items():
            found.setdefault(name, []).append((step, value))
    return found


def mlflow_rows(folder):
    (run,) = folder.glob("mlruns/*/*/metrics")
    return {
        file.relative_to(run).as_posix(): [
            (int(step), float(value)) for _, value, step in map(str.split, file.open())
        ]
        for file in run.rglob("*")
        if file.is_file()
    }


@pytest.mark.slow  # some seconds, most of them for imports, all trackers at once
def test_every_tracker_has_the_same_rows_and_goes_on_in_the_same_run(tmp_path, monkeypatch, caplog):
    """The first run logs three steps, of which a checkpoint has two; the second goes on there."""
    read = {"tensorboard": tensorboard_rows, "trackio": trackio_rows, "mlflow": mlflow_rows}
    there = [name for name in read if find_spec(registry.SINKS[name].module)]
    if not there:
        pytest.skip(f"needs {', '.join(read)}: requirements/trackers.txt")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    config = config_of(tmp_path, *there, secret={"api_key": CANARY, "lr": 0.5})
    first = Metrics(config, 0, None)
    for step in (1, 2, 3):
        first.log(step, 4, {"actor/loss": step / 2, "timing/step": 0.25})
    first.close()
    second = Metrics(config, 2, first.run_id)
    for step in (3, 4):
        second.log(step, 4, {"actor/loss": step / 2, "timing/step": 0.25})
    second.close()

    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    assert [line for line in caplog.messages if line.startswith(tuple(there))] == []
    once = [(step, step / 2) for step in (1, 2, 3, 4)]
    twice = [*once[:3], *once[2:]]  # the step that the first run had logged, and the second again
    for name in there:
        found = read[name](tmp_path)
        assert found.keys() == {"actor/loss", "timing/step"}, name
        assert found["actor/loss"] == (once if name == "tensorboard" else twice), name
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    if skipped := read.keys() - {*there}:
        pytest.skip(f"the others pass; {', '.join(skipped)}: requirements/trackers.txt")


MINE = """
import pathlib

class Mine:
    module, install, afterwards = "pathlib", "", ""

    def __init__(self, run, tell):
        self.file = pathlib.Path(run.folder, "mine").open("w")
        tell(f"hello {run.name}")

    def log(self, step, metrics):
        self.file.write(f"{step} {metrics['x'] / metrics['y']}\\n")

    def close(self, good):
        self.file.write(f"{good}\\n")
        self.file.close()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_sink.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    from my_sink import Mine

    monkeypatch.setitem(registry.SINKS, "mine", Mine)


def test_a_my_sink_is_a_module_and_a_line(mine, tmp_path, caplog):
    metrics = Metrics(config_of(tmp_path, "mine"), 0, None)
    metrics.log(1, 2, {"x": 1.0, "y": 2.0})
    metrics.log(2, 2, {"x": 3.0, "y": 2.0})
    metrics.close()
    assert (tmp_path / "mine").read_text().split("\n") == ["1 0.5", "2 1.5", "True", ""]
    assert [line for line in caplog.messages if "mine" in line] == ["mine: hello e"]


def test_one_that_lacks_something_is_an_error_by_name(mine, monkeypatch):
    monkeypatch.delattr(registry.SINKS["mine"], "module")
    with pytest.raises(ConfigError, match="^trainer.trackers=.*: Mine has no module, see RL2"):
        registry.check_trackers(config_of("run", "mine"))


def test_the_sink_of_the_docs(tmp_path, monkeypatch):
    (tmp_path / "csv_sink.py").write_text(example("csv_sink.py"))
    monkeypatch.syspath_prepend(tmp_path)
    from csv_sink import CSV

    monkeypatch.setitem(registry.SINKS, "csv", CSV)
    metrics = Metrics(config_of(tmp_path, "csv"), 0, None)
    metrics.log(1, 2, {"x": 1.0})
    metrics.log(2, 2, {"x": 3.0, "y": 2.0})
    metrics.close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,x", "1,1.0", "2,3.0"]


def test_a_sink_that_raises_is_told_once_and_left_alone(mine, tmp_path, caplog):
    metrics = Metrics(config_of(tmp_path, "mine"), 0, None)
    for step in (1, 2):
        metrics.log(step, 2, {"x": 1.0, "y": 0.0})
    metrics.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    told = [line for line in caplog.messages if line.startswith("mine: ") and "hello" not in line]
    assert len(told) == 1 and told[0].startswith("mine: float division by zero; it gets no more")


def test_a_package_that_is_not_there_is_an_error_by_name(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^trainer.trackers=\['mlflow'\]: mlflow is not inst.*pip"
    ):
        registry.check_trackers(config_of("run", "mlflow"))
    registry.check_trackers(config_of("run", "jsonl"))  # nothing beside it
