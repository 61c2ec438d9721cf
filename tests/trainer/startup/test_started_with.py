"""What of a rank's start is compared with the others', and what may be each machine's own."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from RL2.config import apply_fallbacks
from RL2.datasets.end_of_turn import load_end_tokens
from RL2.distributed.same_start import difference
from RL2.trainer.sources.opening import resolve_source
from RL2.trainer.startup import started_with as module
from RL2.trainer.startup.fingerprints import of_run
from RL2.trainer.startup.models import load_tokenizer
from RL2.trainer.startup.started_with import file_facts, started_with
from tests.trainer.support import composed, overrides, write_files, write_rows

HOSTS = ["a", "b"]
LOSS = "def mine(logps):\n    return -logps\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    (files / "loss.py").write_text(LOSS)
    return files


def facts(files, trainer="spo", **changes):
    config = composed(trainer, overrides(files, trainer, "runs/x", **changes))
    apply_fallbacks(config, cuda=False, available=set())
    return started_with(config)


def line(files, trainer="spo", **changes):
    return difference([facts(files), facts(files, trainer, **changes)], HOSTS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"actor__lr": 2e-3},
            "actor.lr: rank 0 on a has 0.001, rank 1 on b has 0.002; start all ranks",
        ),
        # What follows another key is not what somebody has set.
        ({"trainer__seed": 1}, "trainer.seed: rank 0 on a has 0, rank 1 on b has 1 (and actor.l"),
        ({"trainer__max_steps": 9}, "trainer.max_steps: rank 0 on a has null, rank 1 on b has 9"),
        (
            {"trainer__load_ckpt_from": "latest"},
            "trainer.load_ckpt_from: rank 0 on a has null, rank 1 on b has latest; ",
        ),
        ({"trainer__save_dir": "runs/y"}, "trainer.save_dir: rank 0 on a has runs/x, rank 1 on b"),
        (
            {"actor__loss__import_path": "x.py:f"},
            "actor.loss.import_path: rank 0 on a has null, rank 1 on b has a path:f (and actor.",
        ),
        ({"rollout__env_path": "other.py", "trainer__use_wandb": "true"}, None),  # compared later
        ({"trainer": "sft"}, "train_data.path: rank 0 on a has a path, rank 1 on b has none (and "),
    ],
)
def test_commands(files, changes, expected):
    found = line(files, **changes)
    assert found == expected or found.startswith(expected), found


def test_what_auto_became_on_a_machine(files):
    config = composed("spo", overrides(files, "spo", "runs/x"))
    apply_fallbacks(config, cuda=True, available={"vllm"})
    found = difference([facts(files), started_with(config)], HOSTS)
    assert found.startswith("actor.device: rank 0 on a has cpu, rank 1 on b has cuda (and actor.")


def test_a_secret_is_not_shown_and_a_rank_that_knows_it_differs_from_nobody(files, monkeypatch):
    url = {"actor__loss__options__address": "hunter2hunter2"}
    unknown = facts(files, **url)
    monkeypatch.setenv("JUDGE_API_KEY", "hunter2hunter2")
    known = facts(files, **url)
    assert difference([known, unknown], HOSTS) is None
    found = difference([known, facts(files)], HOSTS)
    assert found.startswith("actor.loss.options.address: rank 0 on a has ***, rank 1 on b has none")


def test_versions_and_variables(files, monkeypatch):
    before = facts(files)
    assert {"torch", "transformers", "rl2", "Python", "the source of RL2"} <= before.keys()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # decides nothing
    assert difference([before, facts(files)], HOSTS).startswith(
        "NVIDIA_TF32_OVERRIDE: rank 0 on a has none, rank 1 on b has 1; set it alike for all"
    )
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "INFO")
    assert difference([before, facts(files)], HOSTS) is None
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "detail")  # has a rank wait for the others
    assert difference([before, facts(files)], HOSTS).startswith("TORCH_DISTRIBUTED_DEBUG: rank 0")
    monkeypatch.delenv("TORCH_DISTRIBUTED_DEBUG")
    monkeypatch.setattr(module.record, "version", lambda name: "9")
    assert "rl2: rank 0 on a has 0.1.0, rank 1 on b has 9 (and torch, transf" in difference(
        [before, facts(files)], HOSTS
    )


def test_the_source_of_the_library(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = module._source_of(tmp_path)
    (tmp_path / "a.txt").write_text("no code")
    assert module._source_of(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert module._source_of(tmp_path) != before


def behind(files, trainer="spo", models=("actor",), **changes):
    changes |= {"actor__loss__import_path": f"{files}/loss.py:mine"}
    changes |= {"rollout__env_workers": 0} if trainer == "spo" else {}
    config = composed(trainer, overrides(files, trainer, "runs/x", **changes))
    tokenizer = load_tokenizer(config)
    ends = load_end_tokens(config.actor, tokenizer)
    source = resolve_source(config)(config, tokenizer, ends)
    inputs = of_run(config, tokenizer, ends, source.datasets, models)
    return file_facts(config, inputs, source.datasets)


def other_weights(folder):
    weights = load_file(folder / "model/model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model/model.safetensors", {"format": "pt"})


def other_template(folder):
    (folder / "model/chat_template.jinja").write_text("{{ messages }}")


def other_end(folder):
    path = folder / "model/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [3, 4]}))


CHANGED = {
    "actor.model_name": other_weights,
    "the chat template of actor.model_name": other_template,
    "train_data.path": lambda folder: write_rows(folder / "rows.jsonl", 23),
    "rollout.env_path": lambda folder: (folder / "env.py").open("a").write("\n# other\n"),
    "actor.loss.import_path": lambda folder: (folder / "loss.py").write_text(f"{LOSS}\n# other\n"),
}


@pytest.mark.parametrize("key", CHANGED)
def test_files_of_another_content(files, tmp_path, key):
    shutil.copytree(files, tmp_path / "copy")
    assert difference([behind(files), behind(tmp_path / "copy")], HOSTS) is None
    CHANGED[key](tmp_path / "copy")
    found = difference([behind(files), behind(tmp_path / "copy")], HOSTS)
    assert found.startswith(f"{key}: rank 0 on a has ") and "; give all ranks the same f" in found


def test_rows_of_sft(files, tmp_path):
    shutil.copytree(files, tmp_path / "copy")
    write_rows(tmp_path / "copy/rows.jsonl", 23)
    found = difference([behind(files, "sft"), behind(tmp_path / "copy", "sft")], HOSTS)
    assert found.startswith("data.path: rank 0 on a has 24 rows of ")


def test_weights_that_one_rank_cannot_read(files, tmp_path):
    shutil.copytree(files, tmp_path / "copy")
    (tmp_path / "copy/model/model.safetensors").write_text("half")
    bad = behind(tmp_path / "copy")
    line = difference([behind(files), bad], HOSTS)
    assert "rank 1 on b has " in line and "/copy/model (not readable: " in line
    assert difference([bad, bad], HOSTS) is None  # and who loads the model says it


def test_where_generation_ends(files, tmp_path):
    shutil.copytree(files, tmp_path / "copy")
    other_end(tmp_path / "copy")
    found = difference([behind(files), behind(tmp_path / "copy")], HOSTS)
    assert found.startswith("the end tokens of actor.model_name: rank 0 on a has ")
    assert " rank 1 on b has " in found and "model ([[3, 4" in found


def test_the_reference_model_and_the_test_set_are_looked_at_where_they_are_used(files, tmp_path):
    shutil.copytree(files, tmp_path / "copy")
    other_weights(tmp_path / "copy")
    own, other = (
        behind(
            files, models=("actor", "ref_actor"), ref_actor__model_name=folder / "model",
            test_data__path=folder / "rows.jsonl",
        )
        for folder in (files, tmp_path / "copy")
    )  # fmt: skip
    assert "test_data.path" in own
    assert difference([own, other], HOSTS).startswith("ref_actor.model_name: ")
