"""What may change when a run goes on, from when on it counts, and what is refused."""

import json
import logging
import shutil
import warnings

import pytest
import torch.distributed.checkpoint as dcp
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from RL2.config.schema import SCHEMAS, key_types
from RL2.distributed import rank
from RL2.runtime.errors import CheckpointError, DataError
from RL2.trainer import loop
from RL2.trainer.checkpoints import manifest, resume
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from tests.ranks import run_on_ranks
from tests.trainer.support import (
    NoData,
    checkpoint_tensors,
    composed,
    lasting,
    overrides,
    rows_of,
    same_weights,
    train,
    weights,
    write_files,
    write_model,
)
from tests.workers.test_actor import as_spo, make_actor, make_batch, make_model

# A rate that each step changes, of three epochs of three steps.
SETTINGS = {
    "trainer__n_epochs": 3, "trainer__max_steps": 3, "trainer__save_freq": 1,
    "actor__scheduler": "cosine", "actor__warmup_ratio": 0.0, "actor__lr": "1e-4",
}  # fmt: skip
LATEST = {"trainer__load_ckpt_from": "latest"}
ADAPTERS = {"actor__lora__rank": 4, "actor__lora__alpha": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def saved(files, tmp_path_factory):
    """Call with a trainer and changes: the folder of a run of three steps."""
    runs = {}

    def run(trainer="sft", **changes):
        key = trainer, tuple(changes.items())
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("saved") / "run"
            train(files, trainer, runs[key], **SETTINGS | changes)
        return runs[key]

    return run


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="RL2")
    return lambda: [
        text
        for text in caplog.messages
        if "from here on" in text and not text.startswith("trainer.save_dir=")
    ]


def rates(rows):
    return [row["actor/lr"] for row in rows]


# --------------------------------------------------------------------------- what takes effect


def test_nothing_is_said_where_nothing_was_changed(files, saved, tmp_path, lines):
    start = saved() / "checkpoints/step000002"
    train(files, "sft", saved(), **SETTINGS | {"trainer__load_ckpt_from": start})
    assert lines() == []


def test_a_longer_run_goes_on_by_its_own_schedule(files, saved, tmp_path, lines):
    """cosine of 1e-4 over 3 steps, then over 6."""
    folder = shutil.copytree(saved(), tmp_path / "run")
    rows = train(files, "sft", folder, **SETTINGS | LATEST | {"trainer__max_steps": 6})
    assert rates(rows)[3:] == pytest.approx([5e-5, 2.5e-5, 6.698729810778065e-6], rel=1e-6)
    whole = train(files, "sft", tmp_path / "whole", **SETTINGS | {"trainer__max_steps": 6})
    assert rates(rows)[3:] == rates(whole)[3:]
    (line,) = lines()
    assert line.startswith("trainer.max_steps=6 from here on, was 3")


CHANGED = {
    "lr": {"actor__lr": "3e-4"},
    "scheduler": {"actor__scheduler": "linear"},
    "warm-up": {"actor__warmup_ratio": 0.5},
    "epochs": {"trainer__n_epochs": 2},
}


@pytest.mark.parametrize("kind", CHANGED)
def test_the_rate_is_that_of_a_run_planned_so_from_the_start(files, saved, tmp_path, kind, lines):
    changes = SETTINGS | {"trainer__max_steps": 9} | CHANGED[kind]
    folder = shutil.copytree(saved(), tmp_path / "run")
    rows = train(files, "sft", folder, **changes | LATEST)
    whole = train(files, "sft", tmp_path / "whole", **changes)
    assert rates(rows)[3:] == rates(whole)[3:] and len(rows) == len(whole) > 3
    key = next(iter(CHANGED[kind])).replace("__", ".")
    assert sum(line.startswith(f"{key}=") for line in lines()) == 1


def test_more_updates_on_a_rollout_keep_the_place_in_the_schedule(files, saved, tmp_path):
    changes = SETTINGS | {"trainer__max_steps": 6}
    folder = shutil.copytree(saved("spo"), tmp_path / "run")
    twice = changes | {"actor__update_per_rollout": 2}
    rows = train(files, "spo", folder, **twice | LATEST)
    assert not any(row["actor/skipped"] for row in rows[:3])
    assert rates(rows)[3] == pytest.approx(5e-5)  # half of the steps


def save_checkpoint(model, batch, folder):
    actor = make_actor(model, "spo")
    actor.update(batch if rank() == 0 else None, 1)
    Checkpoints(folder).save(1, {"actor": actor}, {}, {})


def load_checkpoint(model, folder, changes):
    actor = make_actor(model, "spo", **changes)
    Checkpoints(folder).load("latest", {"actor": actor}, NoData())
    moments = len(actor.optimizer.state)
    return moments, [(group["lr"], group["weight_decay"]) for group in actor.optimizer.param_groups]


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize(
    "scheduler", ["constant", "linear", "cosine_with_restarts", "polynomial", "inverse_sqrt"]
)
def test_rate_and_weight_decay_are_of_the_config(tmp_path, n_ranks, scheduler):
    """The moments are of the checkpoint, which holds both as well."""
    model = make_model(tmp_path / "model")
    changes = {"lr": 7e-4, "weight_decay": 0.5, "scheduler": scheduler, "warmup_ratio": 0.2}
    run_on_ranks(n_ranks, save_checkpoint, model, as_spo(make_batch()), tmp_path)
    for moments, groups in run_on_ranks(n_ranks, load_checkpoint, model, tmp_path, changes):
        assert moments > 10
        assert groups == [(pytest.approx(3.5e-4), 0.5)]  # one of two updates of warm-up is done


# ------------------------------------------------------------------------------ what is refused


def never(*_, **__):
    raise AssertionError("a model was loaded")


REFUSED = [
    ({"actor__lora__alpha": 16}, "actor.lora.alpha=16: ", "8", "adapters are scaled by"),
    ({"actor__lora__rank": 2}, "actor.lora.rank=2: ", "4", "the shape of what was trained"),
    ({"actor__lora__target_modules": "q_proj"}, "actor.lora.target_modules=[q_proj]: ",
     "[all-linear]", "other layers"),
    ({"data__batch_size": 4}, "data.batch_size=4: ", "8", "counted in batches"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "begin", "old", "why"), REFUSED)
@pytest.mark.parametrize("named", [False, True], ids=["latest", "named"])
def test_what_may_not_change_is_refused_before_a_model_loads(
    files, saved, monkeypatch, changes, begin, old, why, named
):
    folder = saved(**ADAPTERS)
    monkeypatch.setattr(loop, "load_learners", never)
    which = folder / "checkpoints/step000002" if named else "latest"
    changes = SETTINGS | ADAPTERS | changes | {"trainer__load_ckpt_from": which}
    with pytest.raises(CheckpointError) as caught:
        train(files, "sft", folder, **changes)
    text = str(caught.value)
    assert text.startswith(begin) and "\n" not in text and why in text
    assert f"it was written with {old} (" in text and f"give {begin.split('=')[0]}={old}" in text


def test_the_same_layers_in_another_order_are_the_same(files, tmp_path, lines):
    one, other = "[q_proj,v_proj]", "[v_proj,q_proj]"
    changes = SETTINGS | ADAPTERS
    train(files, "sft", tmp_path, **changes, actor__lora__target_modules=one)
    train(files, "sft", tmp_path, **changes | LATEST, actor__lora__target_modules=other)
    assert lines() == []


def test_a_checkpoint_of_another_kind_of_run_is_refused(files, saved):
    which = saved() / "checkpoints/step000003"
    with pytest.raises(CheckpointError, match="as its run was on rows of a data set; to go on"):
        train(files, "spo", saved().parent / "spo", trainer__load_ckpt_from=which)


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["all weights", "adapters"])
def test_the_model_may_have_moved_but_not_changed(files, saved, tmp_path, lines, changes):
    folder = shutil.copytree(saved(**changes), tmp_path / "run")
    moved = shutil.copytree(files / "model", tmp_path / "elsewhere")
    settings = SETTINGS | changes | LATEST | {"actor__model_name": moved}
    train(files, "sft", folder, **settings)
    assert any(line.startswith(f"actor.model_name={moved} from here on") for line in lines())
    tensors = load_file(moved / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in tensors.items()},
        moved / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=f"give actor.model_name={files / 'model'}, or"):
        train(files, "sft", folder, **settings)
    other = write_model(tmp_path / "other", "gpt2")
    with pytest.raises(CheckpointError, match="its weights, config.json or code have changed"):
        train(files, "sft", folder, **settings | {"actor__model_name": other})


def test_a_model_that_was_overwritten_is_noticed(files, tmp_path):
    """The name is the same."""
    model = shutil.copytree(files / "model", tmp_path / "model")
    changes = SETTINGS | {"actor__model_name": model, "trainer__max_steps": 1}
    train(files, "sft", tmp_path / "run", **changes)
    write_model(model, std=0.3)
    with pytest.raises(CheckpointError, match="give the files as they were, or leave out"):
        train(files, "sft", tmp_path / "run", **changes | LATEST)


def test_other_rows_are_not_called_the_same(files, saved, tmp_path, lines):
    """What changed is told before the rows are compared."""
    path = tmp_path / "rows.jsonl"
    path.write_text((files / "rows.jsonl").read_text().replace("0 + 0 = ", "9 + 9 = "))
    with pytest.raises(DataError, match="but not those that the checkpoint was written with"):
        train(files, "sft", saved(), **SETTINGS | LATEST | {"data__path": path})
    (line,) = [line for line in lines() if line.startswith("data.path=")]
    assert line.endswith(f"was {files / 'rows.jsonl'} (its rows must be the same)")


def test_where_other_rows_are_left_the_changed_key_is_named(files, saved, lines):
    changes = {"data__max_length": 12, "data__overlong": "drop"}
    with pytest.raises(DataError, match="the checkpoint was written with 24"):
        train(files, "sft", saved(), **SETTINGS | LATEST | changes)
    assert any(line.startswith("data.max_length=12 from here on, was 64") for line in lines())


# ------------------------------------------------------------------------------ the comparison


def test_every_key_that_was_changed_is_a_line(files, tmp_path):
    """Those that only follow it are none. Of the lists, each key is one that there is."""
    before = composed("spo", overrides(files, "spo", "runs/a", trainer__seed=1))
    OmegaConf.resolve(before)
    resume.write(tmp_path, before)
    after = composed(
        "spo",
        overrides(files, "spo", "runs/b", rollout__train_sampling_params__temperature=0.5,
                  rollout__train_sampling_params__stop="[a,b]", trainer__load_ckpt_from="latest",
                  actor__max_grad_norm=2, critic__scheduler="linear", trainer__seed=1),
    )  # fmt: skip
    found = resume.compare(tmp_path, after, {}, {})
    assert found == [
        "actor.max_grad_norm=2.0 from here on, was 1.0",
        f"critic.scheduler=linear from here on, was constant ({resume.NOTES['critic.scheduler']})",
        "rollout.train_sampling_params.temperature=0.5 from here on, was 1.0",
        "rollout.train_sampling_params.stop=[a,b] from here on, was null",
        "trainer.save_dir=runs/b from here on, was runs/a",
    ]
    keys = {key for schema in SCHEMAS.values() for key in key_types(schema)}
    assert {*resume.FIXED, *resume.NOTES} <= keys


def test_a_key_that_another_version_did_not_have_refuses_nothing(files, tmp_path):
    config = composed("sft", overrides(files, "sft", "runs/a"))
    OmegaConf.resolve(config)
    resume.write(tmp_path, config)
    path = tmp_path / resume.NAME
    saved = yaml.safe_load(path.read_text())
    del saved["data"]["batch_size"], saved["actor"]["compile"]
    saved["trainer"]["gone"] = 1
    path.write_text(yaml.safe_dump(saved))
    found = resume.compare(tmp_path, config, {}, {})
    assert [line.partition(" (")[0] for line in found] == [
        "data.batch_size=8 from here on, was absent",
        "actor.compile=false from here on, was absent",
        "trainer.gone=absent from here on, was 1",
    ]


def test_no_secret_is_kept(files, tmp_path, monkeypatch):
    monkeypatch.setenv("RL2_SERVER_KEY", "not-for-everybody")
    lines = overrides(files, "spo", "runs/a", rollout__server_args="[not-for-everybody]")
    config = composed("spo", lines)
    OmegaConf.resolve(config)
    resume.write(tmp_path, config)
    assert "everybody" not in (tmp_path / resume.NAME).read_text()
    assert resume.compare(tmp_path, config, {}, {}) == []


def as_0_1_0(checkpoint):
    """The actor alone, without its name."""
    tensors = checkpoint_tensors(checkpoint)["actor"]
    for path in (checkpoint / ".metadata", *checkpoint.glob("*.distcp")):
        path.unlink()
    with warnings.catch_warnings():  # that there is no process group, which is so
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(tensors, checkpoint_id=checkpoint)
    state = json.loads((checkpoint / "trainer.json").read_text())
    return state | state.pop("learners")["actor"], ("learners",)


def as_the_first(checkpoint):
    """No config, and the scheduler's own state."""
    state, _ = as_0_1_0(checkpoint)
    (checkpoint / resume.NAME).unlink()
    del state["updates_per_rollout"]
    state["scheduler"] = {"last_epoch": state.pop("updates"), "base_lrs": [1e-4], "_last_lr": [0.0]}
    return state, ("learners", "inputs", "threads", "machines")


@pytest.mark.parametrize("convert", [as_0_1_0, as_the_first])
def test_a_checkpoint_of_an_earlier_version_goes_on(files, saved, tmp_path, caplog, convert):
    caplog.set_level(logging.INFO, logger="RL2")
    folder = shutil.copytree(saved(), tmp_path / "run")
    for step in (2, 3):
        checkpoint = folder / f"checkpoints/step{step:06d}"
        about = json.loads((checkpoint / manifest.NAME).read_text())["about"]
        state, unknown = convert(checkpoint)
        (checkpoint / "trainer.json").write_text(json.dumps(state))
        (checkpoint / manifest.NAME).unlink()
        about = {name: value for name, value in about.items() if name not in unknown}
        manifest.write(checkpoint, manifest.fingerprints(checkpoint.iterdir(), checkpoint), about)
    start = folder / "checkpoints/step000002"
    train(files, "sft", folder, **SETTINGS | {"trainer__load_ckpt_from": start})
    no_config = any("step000002 holds no config" in text for text in caplog.messages)
    assert no_config == (convert is as_the_first)
    rows, expected = rows_of(folder), rows_of(saved())
    assert [*map(lasting, rows)] == [*map(lasting, expected)]
    assert same_weights(weights(folder / "final"), weights(saved() / "final"))
