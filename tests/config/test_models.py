"""A model's folder is checked before anything heavy is imported, and runs no code unasked."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import RL2
from RL2.config import validate
from RL2.config.models import ask_hub, context_length, hub_options, weight_options
from RL2.engines.servers.addresses import free_port
from RL2.runtime.errors import ConfigError
from tests.config.support import write_model_files
from tests.hub import hub_at, hub_without

ROOT = Path(RL2.__file__).parents[1]
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


def change(name, **values):
    """Set values in a JSON file of the folder, which may not be there yet."""

    def damage(folder):
        path = folder / name
        content = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return damage


def put(name, make):
    """Have something else stand under a name: `make(path)`."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def to_nothing(path):
    path.symlink_to("nothing")


def index(content):
    return write("model.safetensors.index.json", json.dumps(content).encode())


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])


DAMAGED = {
    "no weights": (rename("model.safetensors", "x"), "has no weights (model.safetensors); give"),
    "pickled": (
        rename("model.safetensors", "pytorch_model.bin"),
        "its weights are pickled (pytorch_model.bin), which can run any code; save them as "
        "safetensors (load, then save_pretrained, in a safe environment), or set "
        "actor.allow_pickle=true",
    ),
    "half a config": (write("config.json", b'{\n"a": 1,'), "model/config.json:2:8: not JSON"),
    "config of another kind": (write("config.json", b"[]"), "not JSON (not an object)"),
    "config in latin-1": (write("config.json", b'{"a": "\xe9"}'), "config.json: not JSON ("),
    "cut off": (cut, "model/model.safetensors is not a whole safetensors file ("),
    "empty": (write("model.safetensors", b""), "is not a whole safetensors file ("),
    "pointer": (write("model.safetensors", b"version https://git-lfs"), "not a whole safetensors"),
    "a pipe": (
        put("model.safetensors", os.mkfifo),
        "model/model.safetensors is not a file; copy",
    ),
    "a part missing": (index({"weight_map": {"a": "model-1.safetensors"}}), "model-1.safetensors"),
    "index without a map": (index({}), "index.json has no weight_map"),
    "index of a list": (index({"weight_map": []}), "index.json has no weight_map"),
    "index out of the folder": (index({"weight_map": {"a": "../x"}}), "files of the folder; copy"),
    "index that says more": (
        index({"weight_map": {"weight": "model.safetensors", "head": "model.safetensors"}}),
        "model/model.safetensors lacks head, which model.safetensors.index.json says is there;",
    ),
    "index of numbers": (index({"weight_map": {"a": 1}}), "index.json has no weight_map"),
    "index with a whole path": (index({"weight_map": {"a": "/x"}}), "index.json has no weight_map"),
    "half an index": (write("model.safetensors.index.json", b"{"), "index.json:1:2: not JSON"),
    "config twice": (write("config.json", b'{"a": 1, "a": 2}'), "(the key 'a' occurs twice in one"),
    "config too deep": (write("config.json", b'{"a":' + b"[" * 99999), "nested too deeply"),
    "config of long numbers": (
        write("config.json", b'{"a":' + b"1" * 9999 + b"}"),
        "not JSON (",
    ),
    "config is a folder": (put("config.json", os.mkdir), "model/config.json is not a file; copy"),
    "config of a pipe": (put("config.json", os.mkfifo), "model/config.json is not a file; copy"),
    "config of nothing": (put("config.json", to_nothing), "model/config.json is a broken link"),
    "no size": (
        change("config.json", vocab_size=True),
        "vocab_size=true: must be a whole",
    ),
    "no context": (
        change("config.json", text_config={"max_position_embeddings": "x"}),
        'model/config.json: text_config.max_position_embeddings="x": must be a whole number, 1 or',
    ),
    "no part": (change("config.json", text_config=[1]), "text_config=[1]: must be an object"),
    "no code": (change("config.json", auto_map="x"), 'auto_map="x": must be an object; correct'),
    "no dtype": (change("config.json", dtype="int8"), 'dtype="int8": must be one of float16, bfl'),
    "no dtype of old": (change("config.json", torch_dtype=3), "torch_dtype=3: must be one of"),
    "an encoder, too": (
        change("config.json", is_encoder_decoder=True),
        "model/config.json: is_encoder_decoder=true: must be false, as only decoders are trained;",
    ),
    "other configs": (
        change("config.json", configuration_files=["config.4.0.0.json"]),
        'configuration_files=["config.4.0.0.json"]: would be read in place of this file',
    ),
    "quantised": (
        change("config.json", quantization_config={"quant_method": "fp8"}),
        "model/config.json: quantization_config says 'fp8': quantised weights cannot be trained;",
    ),
    "a part quantised": (
        change("config.json", text_config={"quantization_config": "mxfp4"}),
        "quantization_config says 'mxfp4'",
    ),
    "an adapter, too": (
        change("adapter_config.json", base_model_name_or_path="a/b"),
        "has full weights and an adapter (adapter_config.json), which may or may not be merged",
    ),
    "an adapter alone": (
        lambda folder: (
            change("adapter_config.json", base_model_name_or_path="a/b")(folder),
            (folder / "model.safetensors").unlink(),
        ),
        "holds an adapter alone (adapter_config.json), made for 'a/b'; merge it into that model",
    ),
    **{
        f"generation config: {content!r:.40}": (
            write("generation_config.json", content),
            f"model/generation_config.json{expected}",
        )
        for content, expected in [
            (b"[]", ": not JSON (not an object); copy"),
            (b'{"eos_token_id": 1', ":1:19: not JSON ("),
            (b'{"a": "\xe9"}', ": not JSON ("),
            (b'{"eos_token_id": "x"}', ': eos_token_id="x": must be a token id, or a l'),
            (b'{"eos_token_id": [null]}', ": eos_token_id=[null]: must be a token id"),
            (b'{"eos_token_id": 1e30}', ": eos_token_id=1e+30: must be a token id"),
            (b'{"eos_token_id": true}', ": eos_token_id=true: must be a token id"),
            (b'{"eos_token_id": -7}', ": eos_token_id=-7: must be a token id"),
            (b'{"bos_token_id": {}}', ": bos_token_id={}: must be a token id"),
            (b'{"pad_token_id": "x"}', ': pad_token_id="x": must be a whole number'),
            (b'{"temperature": "x"}', ': temperature="x": must be a finite number; correct the'),
            (b'{"top_p": NaN}', ": top_p=NaN: must be a finite number"),
        ]
    },
    **{
        f"{name} is not text": (write(name, b"\xff"), f"model/{name}: not ")
        for name in (
            "tokenizer_config.json",
            "tokenizer.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.json",
            "chat_template.jinja",
            "merges.txt",
        )
    },
    **{
        f"{name} is a pipe": (put(name, os.mkfifo), f"model/{name} is not a file; copy")
        for name in ("generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    },
    "tokenizer of a list": (write("tokenizer.json", b"[]"), "tokenizer.json: not JSON (not an o"),
    "no length": (
        change("tokenizer_config.json", model_max_length="x"),
        'model/tokenizer_config.json: model_max_length="x": must be a finite number',
    ),
    "no class": (
        change("tokenizer_config.json", tokenizer_class=3),
        "tokenizer_class=3: must be",
    ),
    **{
        f"chat template {template}": (
            change("tokenizer_config.json", chat_template=template),
            "chat_template=" + json.dumps(template) + ": must be a text, or a list of objects",
        )
        for template in (5, {"a": 1}, [1], [{"name": "default"}])
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders(folder, message, case):
    damage, expected = DAMAGED[case]
    damage(folder)
    text = message()
    assert text.startswith("actor.model_name=model: ") and expected in text


def test_what_models_have_is_taken(folder, composed):
    change("config.json", eos_token_id=[2, 3], text_config=None, pad_token_id=-1, x=math.inf)(
        folder
    )
    change("generation_config.json", eos_token_id=-1, pad_token_id=-1, temperature=None)(folder)
    templates = [{"name": "default", "template": "{{ messages }}"}]
    change("tokenizer_config.json", chat_template=templates)(folder)
    for name in ("config.json", "model.safetensors"):  # as in the hub's cache
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    validate(composed("spo", "actor.model_name=model"), 1)


UNREADABLE = """
import os, sys
from pathlib import Path
from RL2.runtime.errors import ConfigError
from RL2.config.model_files import read_folder
if os.getuid() == 0:  # whom no mode keeps out
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for name in sys.argv[1:]:
    try:
        read_folder(Path(name), f"actor.model_name={name}", "actor.allow_pickle", False)
    except ConfigError as error:
        print(error)
"""


def test_files_that_this_user_may_not_read(tmp_path):
    os.chmod(tmp_path, 0o755)
    names = (".", "config.json", "generation_config.json", "model.safetensors")
    for number, name in enumerate(names):
        folder = write_model_files(tmp_path / str(number))
        change("generation_config.json")(folder)
        os.chmod(folder / name, 0)
    numbers = [str(number) for number in range(len(names))]
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, *numbers], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for number in numbers:
        os.chmod(tmp_path / number, 0o700)
    assert done.stdout.splitlines() == [
        f"actor.model_name={number}: {Path(number, name)} cannot be read (Permission denied); "
        "make it readable for this user, or copy the model to a place where it is"
        for number, name in zip(numbers, names, strict=True)
    ]


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
    for name, value in (
        ("config.json", {"AutoConfig": "owner/name--file.Class"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["owner/name--file.Class", None]}),
        ("tokenizer_config.json", [None, "owner/name--file.Class"]),  # as it once was
    ):
        change(name, auto_map=value)(folder)
        assert "set actor.revision to" in message(code)
        validate(composed("spo", "actor.model_name=model", code, f"actor.revision='{COMMIT}'"), 1)
        change(name, auto_map=None)(folder)


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
        assert "no config.json there, so it is not a transformers model" in asked(composed)


def test_a_commit_that_the_hub_does_not_have(monkeypatch, composed):
    with hub_without(monkeypatch, "RevisionNotFound"):
        text = asked(composed, f"actor.revision='{COMMIT}'")
    assert text.startswith(f"actor.revision={COMMIT}: nobody/nothing has no such commit")


def test_a_hub_that_is_not_there_is_asked_once(monkeypatch, composed, tmp_path, caplog):
    """from_pretrained would ask it for most of a minute, with a line for each time."""
    hub_at(monkeypatch, free_port())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = asked(composed)
    assert text.startswith("actor.model_name=nobody/nothing: the request to the hub failed (")
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
