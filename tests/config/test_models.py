"""A model's folder is checked before anything heavy is imported, and runs no code unasked."""

import json
import os

import pytest

from RL2.config import ConfigError, validate
from RL2.config.models import ask_hub, context_length, hub_options, weight_options
from RL2.rollout.servers import free_port
from tests.config.support import write_model_files
from tests.hub import hub_at, hub_without

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(workdir):
    return write_model_files(workdir / "model", max_position_embeddings=2048)


@pytest.fixture
def message(composed):
    def check(*overrides: str, trainer: str = "spo") -> str:
        with pytest.raises(ConfigError) as caught:
            validate(composed(trainer, "actor.model_name=model", *overrides), 1)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def index(content):
    return write("model.safetensors.index.json", json.dumps(content).encode())


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])


def pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


DAMAGED = {
    "no weights": (rename("model.safetensors", "x"), "has no weights (model.safetensors); give"),
    "pickled": (
        rename("model.safetensors", "pytorch_model.bin"),
        "its weights are pickled (pytorch_model.bin), which can run any code; save them as "
        "safetensors (load, then save_pretrained, where nothing is at stake), or set "
        "actor.allow_pickle=true",
    ),
    "half a config": (write("config.json", b'{\n"a": 1,'), "model/config.json:2:8: not JSON"),
    "config of another kind": (write("config.json", b"[]"), "not JSON (not an object)"),
    "config in latin-1": (write("config.json", b'{"a": "\xe9"}'), "config.json: not JSON ("),
    "cut off": (cut, "model/model.safetensors is not a whole safetensors file ("),
    "empty": (write("model.safetensors", b""), "is not a whole safetensors file ("),
    "pointer": (write("model.safetensors", b"version https://git-lfs"), "not a whole safetensors"),
    "a pipe": (pipe, "model/model.safetensors is not a file; copy or download the model again"),
    "a part missing": (index({"weight_map": {"a": "model-1.safetensors"}}), "model-1.safetensors"),
    "index without a map": (index({}), "index.json has no weight_map"),
    "index of a list": (index({"weight_map": []}), "index.json has no weight_map"),
    "index out of the folder": (index({"weight_map": {"a": "../x"}}), "files of the folder; copy"),
    "half an index": (write("model.safetensors.index.json", b"{"), "index.json:1:2: not JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders(folder, message, case):
    damage, expected = DAMAGED[case]
    damage(folder)
    text = message()
    assert text.startswith("actor.model_name=model: ") and expected in text


def test_pickled_weights_where_they_are_allowed(folder, composed):
    rename("model.safetensors", "pytorch_model.bin")(folder)
    config = composed("spo", "actor.model_name=model", "actor.allow_pickle=true")
    validate(config, 1)
    assert weight_options(config.actor) == {"trust_remote_code": False}
    assert weight_options(composed("spo").actor)["use_safetensors"] is True


def test_code_of_the_hub_comes_from_one_commit(composed, message):
    code = "actor.trust_remote_code=true"
    text = message(code, "actor.model_name=a/b")
    assert text.startswith("actor.trust_remote_code=true: ") and "set actor.revision to" in text
    for revision in ("main", "v1.0", COMMIT[:-1], COMMIT.upper()):
        text = message("actor.model_name=a/b", f"actor.revision='{revision}'")
        assert text.startswith(f"actor.revision={revision}: must be a commit, 40 digits")
    config = composed("spo", code, "actor.model_name=a/b", f"actor.revision='{COMMIT}'")
    validate(config, 1)
    options = {"trust_remote_code": True, "revision": COMMIT, "code_revision": COMMIT}
    assert hub_options(config.actor) == hub_options(config.ref_actor) == options


def test_a_folder_needs_no_commit_unless_its_code_is_elsewhere(folder, composed, message):
    code = "actor.trust_remote_code=true"
    validate(composed("spo", "actor.model_name=model", code), 1)
    text = message(f"actor.revision='{COMMIT}'")
    assert text.startswith(f"actor.revision={COMMIT}: has no effect on the folder model; leave")
    write_model_files(folder, auto_map={"AutoConfig": "owner/name--file.Class"})
    assert "set actor.revision to" in message(code)
    validate(composed("spo", "actor.model_name=model", code, f"actor.revision='{COMMIT}'"), 1)


def test_the_context_of_the_model_bounds_lengths(folder, message, composed):
    assert context_length(str(folder)) == 2048
    assert context_length("Qwen/Qwen3-4B") is None
    longer = ("actor.max_length_per_device=9999", "rollout.train_sampling_params.max_new_tokens=8")
    text = message(*longer, "rollout.test_sampling_params.max_new_tokens=2048")
    assert text.startswith("rollout.test_sampling_params.max_new_tokens=2048: must be below 2048")
    text = message("data.max_length=2049", trainer="sft")
    assert text.startswith("data.max_length=2049: must be at most 2048, the context of actor.mo")
    validate(composed("spo", "actor.model_name=model", *longer), 1)


# ------------------------------------------------------------------------------ the hub


def asked(composed, *overrides):
    with pytest.raises(ConfigError) as caught:
        ask_hub(composed("spo", "actor.model_name=nobody/nothing", *overrides).actor, "actor")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_the_hub_does_not_have(monkeypatch, composed):
    with hub_without(monkeypatch, "RepoNotFound"):
        text = asked(composed)
    assert text.startswith("actor.model_name=nobody/nothing: the hub has no model of this name")
    assert "hf auth login" in text


def test_a_name_on_the_hub_that_is_no_model(monkeypatch, composed):
    with hub_without(monkeypatch, "EntryNotFound"):
        assert "no config.json there, so it is no model" in asked(composed)


def test_a_commit_that_the_hub_does_not_have(monkeypatch, composed):
    with hub_without(monkeypatch, "RevisionNotFound"):
        text = asked(composed, f"actor.revision='{COMMIT}'")
    assert text.startswith(f"actor.revision={COMMIT}: nobody/nothing has no such commit")


def test_a_hub_that_is_not_there_is_asked_once(monkeypatch, composed, tmp_path, caplog):
    """from_pretrained would ask it for most of a minute, with a line for each time."""
    hub_at(monkeypatch, free_port())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = asked(composed)
    assert text.startswith("actor.model_name=nobody/nothing: the hub cannot be asked for it (")
    assert text.endswith("and no copy is cached; give a folder made by save_pretrained")
    assert not caplog.records
    cached = tmp_path / f"models--nobody--nothing/snapshots/{COMMIT}/config.json"
    cached.parent.mkdir(parents=True)
    cached.write_text("{}")
    (tmp_path / "models--nobody--nothing/refs").mkdir()
    (tmp_path / "models--nobody--nothing/refs/main").write_text(COMMIT)
    for revision in ((), (f"actor.revision='{COMMIT}'",)):
        node = composed("spo", "actor.model_name=nobody/nothing", *revision).actor
        ask_hub(node, "actor")
    assert "no copy is cached" in asked(composed, f"actor.revision='{COMMIT[::-1]}'")


def test_a_folder_is_not_asked_for(folder, composed):
    ask_hub(composed("spo", "actor.model_name=model").actor, "actor")
