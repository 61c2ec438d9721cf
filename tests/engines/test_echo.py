"""An engine of one's own, from a file and from the list, as `docs/engines.md` and CONTRIBUTING.md
show it."""

import sys
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from RL2.config.engines import ENGINES, EngineKind
from RL2.engines.registry import build_engine, engine_maker
from RL2.runtime.errors import ConfigError, EngineError
from RL2.trainer.main import launch
from tests.docs import example
from tests.trainer.support import composed, overrides, train, write_files

ECHO = example("my_engine.py")


@pytest.fixture
def echo(tmp_path):
    path = tmp_path / "my_engine.py"
    path.write_text(ECHO)
    return path


def build(name):
    return build_engine(OmegaConf.create({"rollout": {"engine": str(name)}}), None, None)


def test_it_writes_the_samples_of_a_run(tmp_path, echo):
    files = write_files(tmp_path / "files")
    rows = train(files, "spo", tmp_path / "run", rollout__engine=f"{echo}:make",
                 trainer__max_steps=2)  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["rollout/staleness"] for row in rows] == [0.0, 0.0]  # it got new weights
    lines = (tmp_path / "run/rollouts/step000002_train.jsonl").read_text().splitlines()
    assert lines


def test_one_line_of_the_list_makes_it_an_engine_like_the_others(monkeypatch):
    module = ModuleType("RL2.engines.echo")
    exec(compile(ECHO, "echo.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "RL2.engines.echo", module)
    monkeypatch.setitem(
        ENGINES, "echo", EngineKind("RL2.engines.echo:make", "writes what it has read")
    )
    assert type(build("echo")).__name__ == "Echo"


FAULTS = {
    "no_file.py:make": "there is no file .*no_file.py",
    "my_engine.py:mak": "no mak in .*did you mean make",
    "no_module:make": "importing no_module raised ModuleNotFoundError",
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_that_is_not_there_ends_the_run_before_it_starts(name, echo, monkeypatch):
    monkeypatch.chdir(echo.parent)
    with pytest.raises(ConfigError, match=f"rollout.engine={name}: {FAULTS[name]}"):
        engine_maker(name)


def test_a_name_that_no_engine_has_is_refused(tmp_path):
    files = write_files(tmp_path / "files")
    config = composed("spo", overrides(files, "spo", tmp_path, rollout__engine="transfromers"))
    with pytest.raises(ConfigError, match="rollout.engine=transfromers: not an engine; use auto, "
                       "transformers, sglang or vllm, or "
                       "my_engine.py:make for your own"):  # fmt: skip
        launch(config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ECHO.replace("async def generate", "async def complete"), "abstract .*generate"),
        (ECHO.replace("(Engine):", ":"), "has no abort, close, context_length, .*; derive it from"),
        (
            ECHO.replace("return Echo()", "return Echo(1 / 0)"),
            r"ZeroDivisionError: .*my_engine.py:\d+",
        ),
    ],
)
def test_one_that_lacks_something_is_one_line(echo, source, message):
    echo.write_text(source)
    with pytest.raises(EngineError, match=f"rollout.engine={echo}:make: .*{message}") as raised:
        build(f"{echo}:make")
    assert "\n" not in str(raised.value)
