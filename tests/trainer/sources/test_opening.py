"""Sources by name, and from a file of one's own."""

import json

import pytest

from RL2.config import validate
from RL2.runtime.errors import CheckpointError, ConfigError, DataError
from RL2.trainer import loop
from RL2.trainer.main import launch
from RL2.trainer.sources.opening import resolve_source
from RL2.trainer.sources.rollouts import RolloutSource
from RL2.trainer.sources.rows import RowSource
from RL2.trainer.sources.source import Source
from tests.docs import example
from tests.trainer.support import composed, overrides, same_weights, train, weights, write_files

# Beside the source of docs/data.md, some that go wrong.
WRONG = """
from RL2.trainer.sources.source import Source


class NoAdvantages(Pairs):
    def batch(self, items):
        return collate(items[0])


class NoRows(Pairs):
    def read(self, config, tokenizer, ends):
        return []


class Slip(Pairs):
    def read(self, config, tokenizer, ends):
        return 1 / 0


class Half(Source):
    def __init__(self, config, tokenizer, ends):
        self.steps_per_epoch, self.per_step = 1, "nothing"

    def collect(self, step, last):
        return None, {}


def no_class(config, tokenizer, ends):
    return None


class NoSource:
    pass
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    (files / "pairs.py").write_text(example("my_source.py") + WRONG)
    rows = [{"prompt": f"{i} = ", "chosen": f"{i}.", "rejected": f"{i + 1}!"} for i in range(8)]
    (files / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def found(files, trainer, source):
    return resolve_source(composed(trainer, overrides(files, trainer, "x", trainer__source=source)))


@pytest.mark.parametrize(
    ("trainer", "source", "said"),
    [
        ("sft", "rollouts", "reads train_data, test_data, rollout, which this trainer's config "),
        ("ppo", "rows", "reads data, which this trainer's config does not have; use another sour"),
        ("sft", "nowhere.py:Pairs", "there is no file "),
        ("sft", "{files}/pairs.py:Paris", "Paris"),
        ("sft", "{files}/pairs.py:no_class", "is no source; derive it from RL2.trainer.sources.so"),
        ("sft", "{files}/pairs.py:NoSource", "is no source; derive it from RL2.trainer.sources.so"),
        ("sft", "{files}/pairs.py:Half", "has no load_state_dict, state_dict; see RL2.trainer.sou"),
        ("ppo", "{files}/pairs.py:Pairs", "reads data, which this trainer's config does not have"),
    ],
)
def test_what_is_no_source_is_one_line(files, trainer, source, said):
    source = source.format(files=files)
    with pytest.raises(ConfigError) as caught:
        found(files, trainer, source)
    line = str(caught.value)
    assert line.startswith(f"trainer.source={source}: ") and said in line and "\n" not in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "NoAdvantages",
            "trainer.source={source}: its batches have no advantages, chosen, correct, pair_ids",
        ),
        ("NoRows", "data.path: no items; name a data set that has some"),
        (
            "Slip",
            "trainer.source={source}: making it raised ZeroDivisionError: division by zero (p",
        ),
    ],
)
def test_a_source_that_fails_is_one_line_before_a_model_loads(
    files, tmp_path, monkeypatch, name, said
):
    monkeypatch.setattr(loop, "load_learners", None)
    source = f"{files / 'pairs.py'}:{name}"
    changes = {"trainer__source": source, "data__path": files / "pairs.jsonl"}
    with pytest.raises((ConfigError, DataError)) as caught:
        train(files, "sft", tmp_path / "run", **changes)
    assert str(caught.value).startswith(said.format(source=source))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none_is_found_before_anything_loads(files):
    with pytest.raises(ConfigError, match="^trainer.source=row: not a source; use rollouts, rows"):
        launch(composed("sft", overrides(files, "sft", "x", trainer__source="row")))


@pytest.mark.parametrize(("trainer", "source"), [("spo", RolloutSource), ("sft", RowSource)])
def test_the_sources_of_the_trainers(files, trainer, source):
    assert resolve_source(composed(trainer, overrides(files, trainer, "x"))) is source


def test_a_source_over_pairs_from_a_file(files, tmp_path):
    """It trains, its steps and rows are its own, and a run that resumes goes on exactly."""
    changes = {
        "trainer__source": f"{files / 'pairs.py'}:Pairs", "data__path": files / "pairs.jsonl",
        "data__batch_size": 3, "trainer__save_freq": 1, "trainer__n_epochs": 2,
    }  # fmt: skip
    validate(composed("sft", overrides(files, "sft", tmp_path / "run", **changes)), 1)
    (files / "loss.py").write_text(
        "def apart(logps, ref_logps, advantages):\n"
        "    return -advantages * logps, {'moved': (logps - ref_logps).abs()}\n"
    )
    changes["actor__loss__import_path"] = f"{files / 'loss.py'}:apart"
    rows = train(files, "sft", tmp_path / "run", **changes)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # The reference is the model that the run began with.
    assert rows[0]["actor/moved"] < 1e-6 < 1e-4 < rows[5]["actor/moved"]
    assert all(row["actor/grad_norm"] > 0 for row in rows)
    checkpoint = tmp_path / "run/checkpoints/step000002"
    again = train(files, "sft", tmp_path / "more", **changes, trainer__load_ckpt_from=checkpoint)
    assert [row["actor/loss"] for row in again] == [row["actor/loss"] for row in rows[2:]]
    assert same_weights(weights(tmp_path / "run/final"), weights(tmp_path / "more/final"))
    with pytest.raises(CheckpointError, match="its run was on a source of its own; to go on from"):
        train(files, "sft", tmp_path / "more", trainer__load_ckpt_from=checkpoint)


def test_a_loss_of_pairs_learns_from_them(files, tmp_path):
    (files / "simpo.py").write_text(example("my_sequences.py"))
    changes = {
        "trainer__source": f"{files / 'pairs.py'}:Pairs", "data__path": files / "pairs.jsonl",
        "actor__loss__import_path": f"{files / 'simpo.py'}:simpo", "data__batch_size": 8,
        "trainer__n_epochs": 3, "actor__lr": 1e-2,
    }  # fmt: skip
    first, *_, last = train(files, "sft", tmp_path / "run", **changes)
    assert last["actor/margin"] > first["actor/margin"] + 0.1
    assert last["actor/loss"] < first["actor/loss"]
    changes["trainer__source"] = "rows"
    with pytest.raises(ConfigError, match="simpo names pairs, which trainer.source=rows does not"):
        train(files, "sft", tmp_path / "more", **changes, trainer__save_dir=tmp_path / "more")


class Minimal(Source):
    """What a source has to have at least, beside its batches."""

    @classmethod
    def brings(cls, config):
        return ("advantages",)

    def __init__(self, config, tokenizer, ends):
        self.steps_per_epoch, self.per_step = 2, "nothing"

    def collect(self, step, last):
        return None, {}

    def state_dict(self):
        return {}

    def load_state_dict(self, states):
        pass


def test_the_least_source_takes_part_in_a_run(files, tmp_path):
    """Nobody is given weights, nothing is evaluated, and nothing was learned."""
    rows = train(
        files, "sft", tmp_path / "run", trainer__source=f"{__name__}:Minimal",
        actor__loss__name="nll",
    )  # fmt: skip
    assert [row["actor/skipped"] for row in rows] == [1.0, 1.0]
    assert not any("timing/evaluate" in row for row in rows)
    assert same_weights(weights(files / "model"), weights(tmp_path / "run/final"))
