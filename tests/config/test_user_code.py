"""Code of the user's own, as configs name it."""

from omegaconf import OmegaConf

from RL2.config.paths import expand_argv, expand_paths
from RL2.config.user_code import CODE_KEYS, runs_user_code, user_code, without_places


def test_the_keys():
    assert {*CODE_KEYS} == {
        "actor.loss.import_path", "adv.import_path", "rollout.engine", "rollout.judges",
        "teacher.import_path", "trainer.source",
    }  # fmt: skip


def test_where_it_is(composed):
    config = composed("spo")
    assert user_code(config) == {} and not runs_user_code(config)
    config = composed(
        "spo", "rollout.judges=[agreement,a.py:f,b.c:g]", "adv.import_path=d.py:h",
        "rollout.engine=vllm",
    )  # fmt: skip
    assert user_code(config) == {"rollout.judges": ["a.py", "b.c"], "adv.import_path": ["d.py"]}
    assert runs_user_code(config)


def test_other_things_of_the_user_s_in_the_process(composed):
    assert runs_user_code(composed("spo", "rollout.env_workers=0"))


def test_places_may_differ_and_names_may_not():
    assert without_places("vllm") == "vllm" and without_places(None) is None
    assert without_places(["agreement", "/a/x.py:f"]) == without_places(["agreement", "/b/x.py:f"])
    assert without_places("x.py:f") != without_places("x.py:g")


def test_home_folders_in_lists(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_argv(["rollout.judges=[agreement,~/j.py:f]"]) == [
        "rollout.judges=[agreement,/home/me/j.py:f]"
    ]
    config = OmegaConf.create({"rollout": {"judges": ["agreement", "~/j.py:f"]}})
    expand_paths(config)
    assert config.rollout.judges == ["agreement", "/home/me/j.py:f"]
