"""`algorithm=<name>`: each file says what it is, composes, and passes all checks of a run."""

import json
import os
import re
import subprocess
import sys
from inspect import signature

import pytest

from RL2.algorithms import ADVANTAGES, LOSSES, resolve_advantage, resolve_loss
from RL2.config import check_overrides, validate
from RL2.config.checks.objective import CLIPPED_LOSSES
from RL2.config.overrides import take_back
from RL2.config.presets import FOLDER, preset_names, read_preset
from RL2.config.schema import all_keys
from RL2.runtime.errors import ConfigError
from RL2.trainer.algorithms import listed
from RL2.trainer.registries import registry_of
from RL2.trainer.startup.help import help_text
from RL2.trainer.startup.reference import ALGORITHMS
from RL2.trainer.startup.sweep import run_name
from tests.config.support import ROOT, compose_config, quick_config, required

PRESETS = [read_preset(name) for name in preset_names()]


def message(*argv: str, name: str = "ppo") -> str:
    with pytest.raises(ConfigError) as caught:
        check_overrides(name, argv, registry_of)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("preset", PRESETS, ids=lambda one: one.name)
def test_a_preset_is_what_its_overrides_say(preset, workdir):
    named = {override.partition("=")[0] for override in preset.overrides}
    own = [one for one in required(preset.trainer) if one.partition("=")[0] not in named]
    given = [f"algorithm={preset.name}"]
    check_overrides(preset.trainer, own + given, registry_of)
    config = compose_config(preset.trainer, own + given)
    assert config == quick_config(preset.trainer, [*preset.overrides])
    validate(config, 1)
    resolve_loss(config.actor.loss)
    if "adv" in config:
        resolve_advantage(config.adv)


def test_every_loss_and_estimator_is_in_a_preset():
    named = {override for one in PRESETS for override in one.overrides}
    assert {f"actor.loss.name={name}" for name in LOSSES} <= named
    assert {f"adv.estimator={name}" for name in ADVANTAGES} <= named


def test_each_option_of_a_loss_is_a_key():
    keys, takes = all_keys(), {}
    for name, function in LOSSES.items():
        functions = [function, *filter(None, [getattr(function, "select", None)])]
        parameters = [one for f in functions for one in signature(f).parameters.values()]
        takes[name] = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
        assert all(f"actor.loss.{option}" in keys for option in takes[name]), name
    both = {name for name in takes if {"clip_low", "clip_high"} <= takes[name]}
    assert both == {*CLIPPED_LOSSES}
    every = {f"actor.loss.{option}" for options in takes.values() for option in options}
    own = {"actor.loss.name", "actor.loss.import_path", "actor.loss.options"}
    assert {key for key in keys if key.startswith("actor.loss.")} == every | own


def test_an_option_of_another_loss_has_no_effect():
    config = quick_config("ppo", ["actor.loss.name=gspo", "actor.loss.tau_pos=2"])
    with pytest.raises(
        ConfigError, match="actor.loss.tau_pos=2.*: no option of actor.loss.name=gs"
    ):
        resolve_loss(config.actor.loss)


def test_the_command_line_wins_and_later_presets_win():
    own = required("ppo")
    config = compose_config("ppo", [*own, "actor.avg_level=token", "algorithm=grpo"])
    assert config.actor.avg_level == "token" and config.adv.norm_var
    both = compose_config("ppo", [*own, "algorithm=[grpo,icepop]"])
    assert both.adv.norm_var and both.actor.tis_type == "mask"


@pytest.mark.parametrize(
    ("given", "taken_back"),
    [
        (["algorithm=[dapo,gspo]"], ["actor.loss.clip_high", "actor.loss.clip_low"]),
        (["algorithm=[kl_cov,rloo]"], ["adv.norm_var"]),
        (["algorithm=[pass_k,maxrl]"], ["adv.k"]),
        (["algorithm=gspo", "adv.estimator=rloo"], ["adv.norm_var"]),
        (["algorithm=dapo", "actor.clip=0.3"], ["actor.loss.clip_high", "actor.loss.clip_low"]),
        (["algorithm=[dual_clip,dapo]"], []),  # both are ppo
        (["algorithm=[gspo,dapo]"], []),
        (["algorithm=gspo", "adv.estimator=rloo", "adv.norm_var=true"], []),
        (["-m", "algorithm=[dapo,gspo],grpo"], []),
    ],
)
def test_a_replaced_function_leaves_its_options_behind(given, taken_back, workdir):
    lines = check_overrides("ppo", given, registry_of)
    assert [one.partition("=")[0] for one in lines[: len(taken_back)]] == taken_back
    assert sorted(lines[len(taken_back) :]) == sorted(given)
    if "-m" in given or "adv.norm_var=true" in given:
        return
    config = compose_config("ppo", [*required("ppo"), *lines])
    resolve_loss(config.actor.loss)
    resolve_advantage(config.adv)
    if "actor.loss.clip_low" in taken_back:
        clip = 0.3 if "actor.clip=0.3" in given else None  # null: that of gspo
        assert (config.actor.loss.clip_low, config.actor.loss.clip_high) == (clip, clip)


@pytest.mark.parametrize(
    ("lines", "clips"),
    [
        (["algorithm=dapo", "actor.loss.name=gspo"], (None, None)),
        (["algorithm=dapo", "actor.loss.name=ppo"], (0.2, 0.28)),
        (["algorithm=[dapo,gspo]", "actor.loss.clip_low=0.1"], (0.1, None)),
    ],
)
def test_each_run_of_a_sweep_leaves_behind_what_its_own_command_would(lines, clips):
    """Such as those of `algorithm=dapo actor.loss.name=gspo,ppo`."""
    config = compose_config("ppo", [*required("ppo"), *lines])
    take_back(config, lines)
    assert (config.actor.loss.clip_low, config.actor.loss.clip_high) == clips
    alone = check_overrides("ppo", lines, registry_of)
    assert config == compose_config("ppo", [*required("ppo"), *alone])


def test_names_are_checked():
    assert message("algorithm=grop").startswith(
        "algorithm=grop: unknown algorithm; did you mean grpo? use "
    )
    assert "did you mean dr_grpo?" in message("algorithm=dr-grpo")
    assert message("algorithm=null") == "algorithm=null: names no algorithm; leave it out"
    assert message("algorithm=[grpo,zzz]").startswith("algorithm=zzz: unknown algorithm; use ")
    assert message("+algorithm=grpo") == (
        "+algorithm=grpo: the group exists already; leave out the +"
    )
    assert message("~algorithm").endswith("cannot be removed; leave it out")
    assert message("algorithm=grpo", name="spo") == (
        "algorithm=grpo: is for the trainer ppo, not for spo; run "
        "`-m RL2.trainer.ppo algorithm=grpo`"
    )
    assert "several values need a sweep" in message("algorithm=grpo,icepop")
    assert "unknown algorithm" in message("-m", "algorithm=grpo,zzz")
    check_overrides("ppo", ["-m", "algorithm=grpo,icepop"], registry_of)


def test_a_comment_must_say_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("RL2.config.presets.FOLDER", tmp_path)
    (tmp_path / "a.yaml").write_text("# what: x\n# paper: y\n#   z\n# equation: a = b\nk: 1\n")
    with pytest.raises(ValueError, match="does not say differs"):
        read_preset.__wrapped__("a")
    (tmp_path / "a.yaml").write_text("# waht: x\nk: 1\n")
    with pytest.raises(ValueError, match="waht"):
        read_preset.__wrapped__("a")


def test_help_the_page_and_the_list_have_every_name():
    page, text = ALGORITHMS.read_text(encoding="utf-8"), listed([])
    for one in PRESETS:
        assert f"\n| `{one.name}`" in page
        assert f"\n{one.name}: {one.what}" in "\n" + text
        assert re.search(rf"\b{one.name}\b", help_text(one.trainer))
        assert (FOLDER / f"{one.name}.yaml").read_text().startswith("# @package _global_\n")
    assert json.loads(listed(["--json", "grpo"]))[0]["overrides"][0] == "actor.avg_level=sequence"
    assert listed(["grpo"]).startswith("grpo: GRPO")
    for wrong in ("grop", "--jsn"):
        with pytest.raises(ConfigError):
            listed([wrong])


def test_the_command_answers_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['x', 'grpo']; "
        "runpy.run_module('RL2.trainer.algorithms', run_name='__main__'); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("grpo: GRPO")


def test_a_sweep_over_algorithms_names_its_runs():
    overrides = ["algorithm=gspo", "actor.lr=1e-5"]
    assert run_name(overrides, {"algorithm"}, 3) == "algorithm_gspo"
