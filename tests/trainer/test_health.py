"""Each rule: what trips it and what just does not, alone and in a run."""

import json

import pytest
from omegaconf import OmegaConf

from RL2.engines.transformers.engine import TransformersEngine
from RL2.runtime.errors import HealthError, TrainingError
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.integrity import damage
from RL2.trainer.health import RULES, LLMKLAlarm, observe
from tests.config.support import quick_config
from tests.faults.support import Run
from tests.trainer.support import command, overrides, rows_of, train, write_env, write_files

OFF = dict.fromkeys(RULES)
LEARNS = {"actor/lr": 1e-6, "actor/grad_norm": 0.1}


def config(patience=3, staleness=0, partial_rollout=False, **bounds):
    rollout = {"staleness": staleness, "partial_rollout": partial_rollout}
    health = OFF | {"patience": patience} | bounds
    return OmegaConf.create({"rollout": rollout, "trainer": {"health": health}})


def problems(config, rows):
    """What each step's metrics lead to; the state goes through JSON, as in a checkpoint."""
    state, found = {}, []
    for row in rows:
        state, problem = observe(config, state, row)
        state = json.loads(json.dumps(state))
        found.append(problem)
    return found


def tripped(config, rows):
    """The steps, counted from 1, after which the run has to stop."""
    return [step for step, problem in enumerate(problems(config, rows), start=1) if problem]


# (bound, metrics that break it, metrics that just do not)
STEPS = {
    "no_signal_steps": (3, {"actor/lr": 1e-6, "actor/skipped": 1.0}, LEARNS),
    "min_entropy": (0.1, {"actor/entropy": 0.0999}, {"actor/entropy": 0.1}),
    "max_entropy": (5.0, {"actor/entropy": 5.001}, {"actor/entropy": 5.0}),
    "max_p_max": (0.99, {"actor/p_max": 0.9901}, {"actor/p_max": 0.99}),
    "max_llm_kl": (0.5, {"rollout/llm_kl": 0.501}, {"rollout/llm_kl": 0.5}),
}


def test_every_rule_has_a_bound_in_the_config():
    for name in ("ppo", "sft"):
        health = quick_config(name, []).trainer.health
        assert set(health) - {"patience"} <= set(RULES)
    assert set(quick_config("ppo", []).trainer.health) == {"patience", *RULES}


@pytest.mark.parametrize("key", STEPS)
def test_a_rule_trips_at_its_bound_after_its_steps_in_a_row(key):
    bound, bad, good = STEPS[key]
    rules = config(**{key: bound})
    assert tripped(rules, [bad] * 4) == [3, 4]
    assert tripped(rules, [bad, bad, good] * 3) == []
    assert tripped(rules, [good] * 9) == []
    assert tripped(rules, [bad, bad, {}, bad]) == [4]  # a step that does not tell changes nothing
    assert tripped(config(), [bad] * 9) == []
    last = problems(rules, [bad] * 3)[-1]
    assert last.startswith(f"trainer.health.{key}={bound}: ") and "3 steps in a row" in last
    assert last.endswith("null turns this rule off") and "\n" not in last


@pytest.mark.parametrize(
    "row", [{"actor/nonfinite": 1.0}, {"actor/grad_norm": 0.0}, {"actor/skipped": 2.0}]
)
def test_no_signal_is_no_update_whatever_the_reason(row):
    assert tripped(config(no_signal_steps=2), [{"actor/lr": 1.0} | row] * 2) == [2]
    assert tripped(config(no_signal_steps=2), [row] * 9) == []  # frozen: nothing should change


def test_length_counts_from_the_first_steps():
    def lengths(*them):
        return [{"train/avg_response_length": length} for length in them]

    rules = config(min_length_ratio=0.1, patience=2)
    assert tripped(rules, lengths(90.0, 110.0, 9.9, 9.9)) == [4]
    assert tripped(rules, lengths(90.0, 110.0, 10.0, 10.0, 10.0)) == []
    assert tripped(rules, lengths(90.0, 110.0, 9.9, 10.0, 9.9)) == []
    assert tripped(rules, lengths(0.0, 0.0, 0.0)) == [2, 3]
    assert tripped(rules, lengths(5.0, 5.0, 50.0, 50.0)) == []


@pytest.mark.parametrize(
    ("setting", "good", "bad"),
    [
        ({}, [0.0], [1.0, 0.001, -1.0]),
        ({"staleness": 1}, [0.0, 1.0], [1.001, 2.0, -0.001]),
        ({"partial_rollout": True}, [0.0, 0.4, 3.0], [-0.001]),
    ],
)
def test_versions_are_those_that_the_run_may_have(setting, good, bad):
    rules = config(check_versions=True, **setting)
    for age in good:
        assert tripped(rules, [{"rollout/staleness": age}] * 3) == []
    for age in bad:
        assert tripped(rules, [{"rollout/staleness": age}]) == [1]
    assert tripped(config(check_versions=False), [{"rollout/staleness": 9.0}]) == []


def test_what_has_gone_well_does_not_trip_the_defaults():
    """GSM8K on a CPU: 24 of 2,560 samples correct, seven steps without any; the quickstart: seven
    tokens a response, sure of most of them."""
    rules = quick_config("spo", [])
    skipped = {"actor/lr": 1e-6, "actor/skipped": 1.0, "rollout/staleness": 0.0}
    learns = LEARNS | {"actor/entropy": 0.2, "actor/p_max": 0.95, "rollout/llm_kl": 1e-13}
    rows = [skipped] * 7 + [learns | {"rollout/staleness": 0.0}] * 13
    rows = [row | {"train/avg_response_length": 7.0 - n % 3} for n, row in enumerate(rows)]
    assert tripped(rules, rows * 2) == []


# ------------------------------------------------------------------------------ in a run

ALWAYS_WRONG = """
async def step(state, action, extra_info):
    return {"next_state": None, "reward": 0.0, "score": 0.0, "done": True}
"""
# Three turns in the first step, one in all later ones.
SHORTER = """
calls = 0


async def step(state, action, extra_info):
    global calls
    calls += 1
    good = float(sum(map(ord, action)) % 2)
    text = state + action + "again"
    return {"next_state": text, "reward": good, "score": good, "done": calls > 24}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    write_env(files / "wrong.py", ALWAYS_WRONG)
    write_env(files / "shorter.py", SHORTER)
    return files


HEALTH = "trainer__health__"
# (what trips the rule, what does not); patience is 2, of six steps
RUNS = {
    "no_signal_steps": ({"no_signal_steps": 2, "env": "wrong.py"}, {"no_signal_steps": 7}),
    "min_entropy": ({"min_entropy": 5.0}, {"min_entropy": 1e-3}),
    "max_entropy": ({"max_entropy": 1e-3}, {"max_entropy": 6.0}),
    "max_p_max": ({"max_p_max": 0.01}, {"max_p_max": 0.9999}),
    "min_length_ratio": (
        {"min_length_ratio": 0.9, "env": "shorter.py"}, {"min_length_ratio": 0.02},
    ),
    "max_llm_kl": ({"max_llm_kl": 0.01, "temperature": 3.0}, {"max_llm_kl": 1e-6}),
    "check_versions": ({"check_versions": "true", "lost": True}, {"check_versions": "true"}),
}  # fmt: skip


def run(files, folder, monkeypatch, env="env.py", temperature=1.0, lost=False, **bounds):
    if lost:  # an engine that is given the first weights alone
        update = TransformersEngine.update_weights

        async def first_only(self, named_tensors, version):
            named = list(named_tensors)
            if version == 0:
                await update(self, named, version)

        monkeypatch.setattr(TransformersEngine, "update_weights", first_only)
    settings = OFF | {"patience": 2} | bounds
    health = {f"{HEALTH}{key}": "null" if v is None else v for key, v in settings.items()}
    train(
        files, "spo", folder, trainer__n_epochs=2, rollout__env_path=files / env,
        rollout__max_turns=3, actor__temperature=temperature, rollout__llm_kl_alarm="null",
        **health,
    )  # fmt: skip


@pytest.mark.parametrize("key", RUNS)
def test_a_run_that_trips_is_saved_logged_and_stopped(files, tmp_path, monkeypatch, key):
    with pytest.raises(HealthError, match=f"^trainer.health.{key}=") as caught:
        run(files, tmp_path / "run", monkeypatch, **RUNS[key][0])
    assert isinstance(caught.value, TrainingError) and "\n" not in str(caught.value)
    last = rows_of(tmp_path / "run")[-1]["step"]
    assert 2 <= last < 6
    (saved,) = Checkpoints(tmp_path / "run").steps()
    assert damage(saved) is None and f"step {last} is in {saved}" in str(caught.value)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("key", RUNS)
def test_a_run_that_does_not_trip(files, tmp_path, monkeypatch, key):
    run(files, tmp_path / "run", monkeypatch, **RUNS[key][1])
    assert rows_of(tmp_path / "run")[-1]["step"] == 6


def test_sft_has_rules_of_its_own(files, tmp_path):
    with pytest.raises(HealthError, match="^trainer.health.max_entropy=0.1: "):
        train(
            files, "sft", tmp_path / "run",
            trainer__health__patience=2, trainer__health__max_entropy=0.1,
        )  # fmt: skip
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    train(files, "sft", tmp_path / "other", trainer__health__max_entropy=6.0)


def test_a_resumed_run_counts_on(files, tmp_path):
    """On two ranks, of which the first one counts and both stop."""
    settings = {
        "rollout__env_path": files / "wrong.py", "trainer__n_epochs": 3,
        "trainer__health__no_signal_steps": 4,
    }  # fmt: skip
    folder = tmp_path / "run"
    Run(files, "spo", folder, 2, trainer__max_steps=3, **settings).finish()
    for step in (4, 5):  # and where nothing has changed, the next one says so again
        rest = Run(files, "spo", folder, 2, trainer__load_ckpt_from="latest", **settings)
        assert rest.wait(end_others=False) == [1, 1]
        assert "HealthError: trainer.health.no_signal_steps=4: no update" in rest.output()
        assert f"{step} steps in a row (train/reward: 0)" in rest.output()
        assert rows_of(folder)[-1]["step"] == step
        assert Checkpoints(folder).steps()[0].name == f"step{step:06d}"


def test_the_command_ends_with_one_line(files, tmp_path):
    done = command(
        "spo",
        overrides(
            files, "spo", tmp_path / "run", rollout__env_path=files / "wrong.py",
            trainer__health__no_signal_steps=1,
        ),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert line.startswith("HealthError: trainer.health.no_signal_steps=1: no update has changed")


def test_the_alarm_goes_off_once_for_as_long_as_it_lasts(caplog):
    alarm = LLMKLAlarm(OmegaConf.create({"rollout": {"llm_kl_alarm": 0.1}}))
    found = [
        alarm({"rollout/llm_kl": kl} if kl is not None else {})
        for kl in (0.05, 0.2, 0.3, 0.1, None, 0.2)
    ]
    assert [one.get("rollout/llm_kl_alarm") for one in found] == [0.0, 1.0, 1.0, 0.0, None, 1.0]
    lines = [line for line in caplog.messages if "rollout.llm_kl_alarm=0.1" in line]
    assert len(lines) == 2 and all("\n" not in line and "look at" in line for line in lines)
    for off in ({"rollout": {"llm_kl_alarm": None}}, {}):
        assert LLMKLAlarm(OmegaConf.create(off))({"rollout/llm_kl": 9.0}) == {}
