"""A run that goes on with other files than it began with says so, or is refused."""

import json
import logging
import shutil

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from RL2.runtime.errors import CheckpointError
from RL2.trainer.checkpoints import manifest, resume
from RL2.trainer.checkpoints.export import existing_best, fingerprint_of
from tests.trainer.support import ENVIRONMENT, composed, overrides, rows_of, train, write_files

LOSS = "def mine(logps):\n    return -logps\n"
LATEST = {"trainer__load_ckpt_from": "latest"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Files, and a run on them that has everything: a reference, a loss of its own, a test set."""
    files = write_files(tmp_path_factory.mktemp("origin"))
    shutil.copytree(files / "model", files / "reference")
    (files / "mine.py").write_text(LOSS)
    shutil.copy(files / "rows.jsonl", files / "test.jsonl")
    train(files, "spo", files / "run", **settings(files))
    return files


def settings(files, **changes):
    return {
        "ref_actor__model_name": files / "reference", "actor__kl__coef": 0.1,
        "actor__kl__type": "loss", "actor__loss__import_path": f"{files / 'mine.py'}:mine",
        "test_data__path": files / "test.jsonl", "test_data__max_examples": 4,
        "trainer__max_steps": 2, "trainer__test_freq": 1,
    } | changes  # fmt: skip


@pytest.fixture
def files(origin, tmp_path, caplog):
    """A copy that may be changed. The config's paths are others then."""
    caplog.set_level(logging.INFO, logger="RL2")
    return shutil.copytree(origin, tmp_path / "copy")


def _edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _scale(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(
        tensors | {name: tensors[name] * 1.01}, folder / "model.safetensors", {"format": "pt"}
    )


def _template(files):
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(files / "model")


def _rules(files):
    _edit(files / "model/tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true')


def _end(files):
    path = files / "model/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [3, 4]}))


CHANGES = {
    "a reference": (lambda f: _scale(f / "reference"), "ref_actor.model_name=", "reference: its w"),
    "a template": (_template, "actor.model_name=", "model: its chat template has changed"),
    "rules": (_rules, "actor.model_name=", "model: its tokenizer splits text in another way"),
    "end tokens": (_end, "actor.model_name=", "model: its answers end with other tokens"),
    "which are in the": (lambda f: None, "actor.model_name=", "its generation_config.json has ch"),
    "an environment": (lambda f: (f / "env.py").write_text(ENVIRONMENT + "# more\n"),
                       "rollout.env_path=", "env.py: the file, or a module that it imports, is n"),
    "a loss": (lambda f: (f / "mine.py").write_text(LOSS + "# more\n"),
               "actor.loss.import_path=", "mine.py:mine: the file, or a module that it im"),
    "a test set": (lambda f: _edit(f / "test.jsonl", "0 + 0", "9 + 9"),
                   "test_data.path=", "test.jsonl: its rows have changed"),
}  # fmt: skip


def resumed(files, **changes):
    """What is said of other files, by a run that goes on and has nothing left to do."""
    train(files, "spo", files / "run", **settings(files) | LATEST | changes)


def test_the_same_files_elsewhere_are_the_same(files, caplog):
    resumed(files)
    assert not [line for line in caplog.messages if line.endswith(", from here on")]
    assert any("actor.loss.import_path=" in line and "from here on, was" in line
               for line in caplog.messages)  # fmt: skip


def test_each_other_file_is_a_line(files, caplog):
    for change, _, _ in CHANGES.values():
        change(files)
    resumed(files)
    lines = [line for line in caplog.messages if line.endswith(", from here on")]
    assert len(lines) == len(CHANGES)
    for _, key, text in CHANGES.values():
        assert sum(line.startswith(key) and text in line for line in lines) == 1


def test_other_numbers_of_tokens_are_refused(files):
    for name in ("model", "reference"):  # which must agree with each other
        path = files / name / "tokenizer.json"
        text = path.read_text()
        assert '"A": 32' in text and '"B": 33' in text
        path.write_text(text.replace('"A": 32', '"A": 33').replace('"B": 33', '"B": 32', 1))
    with pytest.raises(CheckpointError, match="gives tokens other numbers than those that were"):
        resumed(files)


def test_weights_under_adapters_are_compared_whole(files):
    """Of a small file every byte: one tensor is another one."""
    run = files / "adapters"
    train(files, "sft", run, actor__lora__rank=2, trainer__max_steps=1)
    _scale(files / "model")
    with pytest.raises(CheckpointError, match="its weights, config.json or code have changed"):
        train(files, "sft", run, actor__lora__rank=2, trainer__max_steps=1, **LATEST)


def test_another_seed_is_refused(files):
    with pytest.raises(CheckpointError) as caught:
        resumed(files, trainer__seed=7)
    assert str(caught.value).startswith("trainer.seed=7: step000002 does not load with it, it was")
    assert "give trainer.seed=0" in str(caught.value)


def test_versions_are_a_line_each(tmp_path):
    files = write_files(tmp_path)
    config = composed("sft", overrides(files, "sft", "runs/a"))
    OmegaConf.resolve(config)
    resume.write(tmp_path, config)
    now = resume.versions()
    assert {*now} == {"rl2", "torch", "transformers"}
    about = {"versions": now | {"torch": "2.0.0"}}
    assert resume.compare(tmp_path, config, {}, about) == [
        f"torch {now['torch']} from here on, was 2.0.0 (results may differ)"
    ]


def test_what_an_older_checkpoint_does_not_tell_is_not_compared(tmp_path):
    files = write_files(tmp_path)
    config = composed("sft", overrides(files, "sft", "runs/a"))
    OmegaConf.resolve(config)
    resume.write(tmp_path, config)
    inputs = {"vocabulary": "a", "rules": "b"}
    assert resume.compare(tmp_path, config, inputs, {"inputs": inputs}) == []
    (line,) = resume.compare(tmp_path, config, inputs, {"model": "x"})
    assert line == (
        f"{tmp_path.name} holds no fingerprints of models, tokenizer and sources, so it is not "
        "known whether those have changed"
    )


# ------------------------------------------------------------------------------ the best model


def test_a_best_model_that_is_not_there_is_forgotten(tmp_path, caplog):
    best = {"step": 4, "test/score": 0.5}
    assert existing_best(best, tmp_path / "best") == {}
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path / 'best'} is not there, which held the best model so far (test/score 0.5 at "
        "step 4); the next evaluation counts as the best"
    )
    (tmp_path / "best").mkdir()
    assert existing_best(best, tmp_path / "best") == best
    start = {"step": 0, "test/score": 0.5}
    assert existing_best(start, tmp_path / "none") == start
    assert existing_best({}, tmp_path / "none") == {}


def test_a_best_model_that_is_a_strangers_is_forgotten(files, caplog):
    best = {"step": 4, "test/score": 0.5, "model": fingerprint_of(files / "model")}
    assert existing_best(best, files / "model") == best
    _scale(files / "model")
    assert existing_best(best, files / "model") == {}
    assert existing_best(best, files) == {}  # no model at all
    assert f"{files / 'model'} is now another model, which held the best" in caplog.messages[0]


def test_the_next_best_is_written_where_checkpoints_were_copied(files, caplog):
    copy = files / "copied"
    shutil.copytree(files / "run/checkpoints", copy / "checkpoints")
    state = copy / "checkpoints/step000002/trainer.json"
    changes = settings(files) | LATEST | {"trainer__max_steps": 3}
    content = json.loads(state.read_text()) | {"best": {"step": 1, "test/score": 9.0}}
    state.write_text(json.dumps(content))
    folder = state.parent
    about = json.loads((folder / manifest.NAME).read_text())["about"]
    paths = [path for path in folder.iterdir() if path.name != manifest.NAME]
    manifest.write(folder, manifest.fingerprints(paths, folder), about)
    train(files, "spo", copy, **changes)
    assert (copy / "best/model.safetensors").exists()
    assert sum("which held the best model so far" in line for line in caplog.messages) == 1
    state = json.loads((state.parents[1] / "step000003/trainer.json").read_text())
    assert state["best"]["model"] == fingerprint_of(copy / "best") != ""
    assert rows_of(copy)[-1]["step"] == 3


def test_a_folder_of_another_run_is_not_continued(origin, files, tmp_path, caplog):
    """Its steps, and its best model, are none of the run whose checkpoint is named."""
    other = tmp_path / "other"
    train(files, "spo", other, **settings(files, actor__lr=1e-4))
    named = {"trainer__load_ckpt_from": files / "run/checkpoints/step000002"}
    train(files, "spo", other, **settings(files, trainer__max_steps=3) | named)
    assert [row["step"] for row in rows_of(other)] == [3]
    assert [row["step"] for row in rows_of(other / "before1")] == [0, 1, 2]
    assert [path.name for path in other.glob("checkpoints/step*")] == ["step000003"]
    assert f"{other}: an earlier run moved aside to {other / 'before1'}" in caplog.messages


def test_a_copy_of_a_checkpoint_is_of_the_folder_that_it_names(origin, tmp_path):
    copy = shutil.copytree(origin / "run/checkpoints/step000002", tmp_path / "kept/long/copy")
    (tmp_path / "link").symlink_to(origin / "run")
    assert resume.is_of(copy, origin / "run") and resume.is_of(copy, tmp_path / "link")
    assert not resume.is_of(copy, tmp_path)
    assert resume.is_of(copy, copy.parents[1])  # where it lies
    (copy / resume.NAME).unlink()
    assert resume.is_of(copy, tmp_path)  # nobody knows
