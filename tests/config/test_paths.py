import getpass
import os
import pwd
from dataclasses import is_dataclass

import pytest
from omegaconf import OmegaConf

from RL2.config import check_overrides, expand_argv, expand_paths, validate
from RL2.config.paths import PATH_KEYS, check_working_directory, expand_home, not_there
from RL2.config.schema import RLConfig, SFTConfig, key_types
from RL2.runtime.errors import ConfigError
from RL2.trainer.registries import registry_of
from tests.config.support import write_model_files

KEYS = key_types(RLConfig) | key_types(SFTConfig)


@pytest.fixture
def home(workdir, monkeypatch):
    folder = workdir / "home" / "jane@example"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_all_keys_that_look_like_paths_are_expanded():
    endings = (
        "path",
        "_dir",
        "_name",
        "_from",
        "_python",
        "_file",
        "_folder",
        ".source",
        ".engine",
        ".judges",
    )
    no_paths = {"trainer.experiment_name"}
    alike = {
        key for key, kind in KEYS.items() if key.endswith(endings) and not is_dataclass(kind)
    }  # fmt: skip
    assert alike - no_paths == set(PATH_KEYS)


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_home_of_the_command_line(home, composed, key, quote):
    """The shell leaves a ~ behind = alone; hydra refuses one without quotes."""
    trainer = "sft" if key.startswith("data.") else "spo"
    opens, closes = "[]" if key == "rollout.judges" else ("", "")
    line = f"{key}={opens}{quote}~/x/y.py:f{quote}{closes}"
    (argument,) = expand_argv([line])
    assert argument == (line if quote else f"{key}={opens}{home}/x/y.py:f{closes}")
    check_overrides(trainer, [argument], registry_of)
    config = composed(trainer, argument)
    expand_paths(config)
    found = OmegaConf.select(config, key)
    assert (found[0] if opens else found) == f"{home}/x/y.py:f"


def test_home_of_users(home):
    me = getpass.getuser()
    folder = pwd.getpwnam(me).pw_dir
    assert expand_home(f"~{me}/x", "trainer.save_dir") == f"{folder}/x"
    assert expand_home(f"train[:3]@~{me}", "data.path") == f"train[:3]@{folder}"
    with pytest.raises(ConfigError) as caught:
        expand_argv(["trainer.save_dir=~nobody-of-this-name/runs"])
    assert str(caught.value) == (
        "trainer.save_dir=~nobody-of-this-name/runs: ~nobody-of-this-name means the home "
        "folder of a user, but there is no user nobody-of-this-name here; write the folder itself "
        "(./~nobody-of-this-name if that is its name)"
    )


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~", "{home}"),
        ("~/a", "{home}/a"),
        ("train@~/a@b/rows.jsonl", "train@{home}/a@b/rows.jsonl"),
        ("train[:10]+train[20:]@~/rows.jsonl", "train[:10]+train[20:]@{home}/rows.jsonl"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("a~", "a~"),
        ("/a/jane@~x/rows.jsonl", "/a/jane@~x/rows.jsonl"),
        ("openai/gsm8k", "openai/gsm8k"),
        ("", ""),
    ],
)
def test_where_it_stands(home, path, expanded):
    assert expand_home(path, "data.path") == expanded.format(home=home)


def test_sweeps_and_other_arguments(home):
    lines = ["actor.model_name=~/a,~/b,org/c", "+train_data.path=test@~/d", "--config-dir=~/e"]
    assert expand_argv(lines) == [
        f"actor.model_name={home}/a,{home}/b,org/c", f"+train_data.path=test@{home}/d",
        f"--config-dir={home}/e",
    ]  # fmt: skip
    others = ["--multirun", "rollout.train_sampling_params.stop='~/a'", "trainer.project=~", "x"]
    assert expand_argv(others) == others
    assert expand_argv(["trainer.save_dir="]) == ["trainer.save_dir="]


def test_what_follows_another_key_is_expanded_with_it(home, composed):
    write_model_files(home / "model")
    config = composed(
        "spo", "actor.model_name='~/model'", "trainer.save_dir='~/${trainer.project}'"
    )
    expand_paths(config)
    names = [config[group].model_name for group in ("actor", "ref_actor", "rollout")]
    assert names == [f"{home}/model"] * 3
    assert config.trainer.save_dir == f"{home}/RL2"
    validate(config, 1)
    before = config.copy()
    expand_paths(config)
    assert config == before


def test_what_does_not_resolve_is_left_to_the_checks(composed):
    config = composed("spo", "trainer.save_dir='${nope}'", "actor.model_name=???")
    expand_paths(config)
    with pytest.raises(ConfigError, match="actor.model_name: required"):
        validate(config, 1)


def test_no_other_place_expands():
    root = os.path.dirname(os.path.dirname(os.path.abspath(validate.__code__.co_filename)))
    found = [
        name
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(".py") and "expanduser" in open(os.path.join(folder, name)).read()
    ]
    assert found == ["paths.py"]


def test_what_is_said_of_a_path_that_leads_nowhere(workdir):
    (workdir / "folder").mkdir()
    (workdir / "file").touch()
    os.mkfifo(workdir / "pipe")
    (workdir / "link").symlink_to("nothing")
    (workdir / "round").symlink_to("round")
    assert not_there("x") == f"no such file in {workdir}"
    assert not_there("/no/such", "folder") == "no such folder"
    assert not_there("folder") == "is a folder, not a file"
    assert not_there("file", "folder") == "is a file, not a folder"
    assert not_there("pipe") == "is a pipe or a device, not a file"
    assert not_there("link", "folder") == "is a broken link; no such folder"
    assert not_there("round") == "is a broken link; no such file"


def test_a_working_directory_that_is_gone(workdir, monkeypatch):
    check_working_directory()
    gone = workdir / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="^the working directory is gone .*; change to a folder"):
        check_working_directory()
