"""Bad input: one line that names key, value and way out, and nothing heavy loaded before it."""

import json

import pytest
from omegaconf import OmegaConf

import RL2.trainer.loop
from RL2.runtime.errors import ConfigError, DataError, RL2Error
from RL2.trainer.main import launch
from tests.trainer.support import command, composed, environ, overrides, write_files, write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def the_line(stderr):
    """The one line that an error is, and that it is the last word."""
    lines = [line for line in stderr.splitlines() if "Error: " in line]
    assert len(lines) == 1, stderr
    return lines[0]


# Found before torch is imported, so a run by the real command costs a fraction of a second.
BY_COMMAND = {
    "unknown key": (["actor.lrr=1"], "actor.lrr=1: unknown key; did you mean actor.lr?"),
    "unknown added key": (["+actor.beta=1"], "+actor.beta=1: unknown key"),
    "wrong type": (["actor.lr=fast"], "actor.lr=fast: not a number"),
    "estimator": (["adv.estimator=gea"], "adv.estimator=gea: not an estimator; use reinforce"),
    "avg_level": (["actor.avg_level=all"], "actor.avg_level=all: not an avg_level; use token"),
    "no model": (["actor.model_name=models/none"], "actor.model_name=models/none: "),
    "no data": (["train_data.path=none.jsonl"], "train_data.path=none.jsonl: no such file"),
    "no user": (["trainer.save_dir=~nobody-here/x"], "trainer.save_dir=~nobody-here/x: ~nobody-"),
    "home": (["actor.model_name=~/no-such-model"], "actor.model_name=/"),
    "no rows": (["train_data.path=empty.jsonl"], "train_data.path=empty.jsonl: the file is empty"),
    "no environment": (["rollout.env_path=none.py"], "rollout.env_path=none.py: no such file"),
    "no checkpoint": (["trainer.load_ckpt_from=none"], "trainer.load_ckpt_from=none: no such"),
    "required": (["train_data.prompts_per_rollout=???"], "train_data.prompts_per_rollout: requ"),
    "not an override": (["actor.lr=[1"], "actor.lr=[1: not an override"),
    "unknown flag": (["--actor.lr=1"], "--actor.lr=1: unknown flag; a key is set by key=value"),
    "nothing to interpolate": (["actor.lr=${nope}"], "actor.lr=${nope}: does not resolve ("),
    "no such yaml": (["--config-name", "nope"], "the configuration cannot be composed (Cannot fi"),
    "another library's key": (
        ["actor.learning_rate=1"],
        "actor.learning_rate=1: unknown key; here that is actor.lr",
    ),
    "another library's value": (
        ["adv.estimator=grpo"],
        "adv.estimator=grpo: GRPO is reinforce with",
    ),
    "too much": (["actor.lr=1e4"], "actor.lr=10000.0: must be above 0 and below 1"),
    "no split": (["train_data.path=openai/gsm8k"], "train_data.path=openai/gsm8k: neither a file"),
    "control characters": (["actor.model_name='a\nb\x1b'"], "actor.model_name=a\\nb\\x1b: no such"),
    "secret": (["rollout.server_url=http://u:p@h"], "rollout.server_url=http://***@h: a secret on"),
    "tp_size": (["actor.tp_size=3"], "actor.tp_size=3: must divide world_size=1; use 1"),
}


@pytest.mark.parametrize("case", BY_COMMAND)
def test_the_command_ends_with_one_line(files, tmp_path, case):
    changes, expected = BY_COMMAND[case]
    (tmp_path / "models").mkdir()
    (tmp_path / "empty.jsonl").touch()
    done = command("spo", overrides(files, "spo", "out") + changes, cwd=tmp_path)
    assert done.returncode == 1
    line = the_line(done.stderr)
    assert line.startswith(f"ConfigError: {expected}"), line
    assert done.stderr.strip() == line  # no warning, no traceback
    assert not (tmp_path / "out").exists()


def test_launch_variables_that_cannot_be_end_the_command_at_once(files, tmp_path):
    """RANK=5 of 2 would wait for ever."""
    variables = {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    lines = overrides(files, "spo", "out")
    done = command("spo", lines, env=environ(**variables), cwd=tmp_path, fresh=True)
    assert done.returncode == 1
    line = the_line(done.stderr)
    assert line.startswith("ConfigError: RANK=5: must be at most 1 with WORLD_S")
    assert done.stderr.strip() == line  # no warning of an import


@pytest.mark.parametrize(("size", "use"), [(3, "1 or 2"), (4, "1 or 2")])
def test_processes_that_tp_size_does_not_divide(files, tmp_path, size, use):
    lines = overrides(files, "spo", "out", actor__tp_size=size)
    done = command("spo", lines, n_processes=2, cwd=tmp_path)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("ConfigError: ")]
    # torchrun adds its own report; of ours there is one line for both processes
    assert ours == [f"ConfigError: actor.tp_size={size}: must divide world_size=2; use {use}"]
    # It is the root cause that torchrun's own report, which comes last, ends with.
    assert done.stderr.splitlines()[-2].endswith(f"  traceback : {ours[0]}"), done.stderr
    assert "RL2/" not in done.stderr.replace(str(files), "")


def rows(path, *them):
    path.write_text("".join(json.dumps(row) + "\n" for row in them))
    return path


def text(path, content):
    path.write_text(content)
    return path


def model(folder, **changes):
    """A whole model, but for these keys of its config.json."""
    write_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# Found when data and functions are read: the trainer starts in this process, and a model that
# loads all the same is a failure of its own.
LOADED = {
    "row without question": (
        "spo",
        lambda t: {"train_data__path": rows(t / "a.jsonl", {"prompt": "x"}, {"answer": "#### 1"})},
        "train_data.path: .*a.jsonl:2: row without question",
    ),
    "a conversation as prompt": (
        "spo",
        lambda t: {
            "train_data__path": rows(t / "a.jsonl", {"prompt": [{"role": "user", "content": "x"}]})
        },
        "train_data.path: .*a.jsonl:1: prompt is .*; a conversation .* belongs under messages",
    ),
    "loss without a number": (
        "spo",
        lambda t: {
            "actor__loss__import_path": f"{text(t / 'l.py', 'def f(logps): return -logps.log()')}:f"
        },
        r"its losses are \[nan, nan, nan\] \(l.py:1, log\)",
    ),
    "environment of another signature": (
        "spo",
        lambda t: {"rollout__env_path": text(t / "e.py", "async def step(prompt, answer): ...")},
        r"rollout.env_path=.*e.py: is called as step\(state, action, extra_info\), but defi",
    ),
    "environment of another answer": (
        "spo",
        lambda t: {"rollout__env_path": text(t / "e.py", "async def step(s, a, e): return 1.0")},
        "rollout.env_path=.*e.py: step returns 1.0, not a dict with reward, score, done in line 1",
    ),
    "loss of another library": (
        "spo", lambda t: {"actor__loss__name": "grpo"}, "=grpo: its clipped loss is ppo"
    ),
    "blank lines only": (
        "spo", lambda t: {"train_data__path": text(t / "b.jsonl", "\n\n")}, "b.jsonl.*(no|empty)"
    ),
    "prompt too long": (
        "spo",
        lambda t: {"train_data__path": rows(t / "c.jsonl", *[{"prompt": "x" * 600}] * 9)},
        "train_data.max_prompt_length=250: .*longest 600 tokens.*raise actor.max_length_per_device",
    ),
    "fewer rows than a batch": (
        "spo", lambda t: {"train_data__prompts_per_rollout": 99},
        "train_data.prompts_per_rollout=99: data set has only 24 rows",
    ),
    "response too long": (
        "sft", lambda t: {"data__path": rows(t / "d.jsonl", {"prompt": "x", "response": "y" * 99})},
        "data.max_length=64: .*longest 101 tokens",
    ),
    "unknown loss": (
        "spo", lambda t: {"actor__loss__name": "max_target"},
        "actor.loss.name=max_target: not a loss; use ppo, .* .did you mean max_target_kl",
    ),
    "option of another loss": (
        "spo", lambda t: {"actor__loss__target": 0.3}, "actor.loss.target=0.3: no option of"
    ),
    "unknown option": (
        "spo", lambda t: {"actor__loss__options__beta": 0.3},
        "actor.loss.options.beta=0.3: no option of",
    ),
    "loss that takes nothing known": (
        "spo",
        lambda t: {"actor__loss__import_path": f"{text(t / 'l.py', 'def f(x): return x')}:f"},
        "actor.loss.import_path=.*",
    ),
    "no loss file": (
        "spo", lambda t: {"actor__loss__import_path": f"{t}/none.py:f"}, "none.py"
    ),
    "clip of another loss": ("spo", lambda t: {"actor__clip": 0.1}, "actor.clip=0.1: has no effec"),
    "environment without step": (
        "spo", lambda t: {"rollout__env_path": text(t / "e.py", "x = 1")},
        "rollout.env_path=.*e.py: must define `async def step",
    ),
    "environment that does not import": (
        "spo", lambda t: {"rollout__env_path": text(t / "e.py", "import nonsense_")},
        "rollout.env_path=.*e.py: cannot import",
    ),
    "environment that exits": (
        "spo", lambda t: {"rollout__env_path": text(t / "e.py", "raise SystemExit(0)")},
        "rollout.env_path=.*e.py: cannot import: SystemExit: 0",
    ),
    "environment that interrupts": (
        "spo", lambda t: {"rollout__env_path": text(t / "e.py", "raise KeyboardInterrupt")},
        r"rollout.env_path=.*e.py: cannot import: KeyboardInterrupt \(e.py:1\)$",
    ),
    "loss that exits": (
        "spo", lambda t: {"actor__loss__import_path": f"{text(t / 'l.py', 'exit(0)')}:f"},
        "actor.loss.import_path=.*raised SystemExit: 0",
    ),
    "longer than the model's context": (
        "spo", lambda t: {"train_data__path": rows(t / "c.jsonl", *[{"prompt": "x" * 251}] * 9)},
        "train_data.max_prompt_length=250: .*longest 251 tokens",
    ),
    "tokenizer of another model": (
        "spo", lambda t: {"actor__model_name": model(t / "m", vocab_size=250)},
        "actor.model_name=.*: the tokenizer has 259 tokens, the model 250",
    ),
    "nonsense in config.json": (
        "spo", lambda t: {"actor__model_name": model(t / "m", hidden_size="x")},
        "actor.model_name=.*: its config.json describes no model that transformers knows \\(",
    ),
    "gae": ("ppo", lambda t: {"adv__lamda": 0.9}, "adv.lamda=0.9: has no effect"),
    "folder without a model": (
        "spo", lambda t: {"actor__model_name": t}, "actor.model_name=.*no config.json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_found_before_a_model_loads(files, tmp_path, monkeypatch, case):
    trainer, changes, expected = LOADED[case]
    monkeypatch.setattr(RL2.trainer.loop, "load_learners", None)
    config = composed(trainer, overrides(files, trainer, tmp_path / "out", **changes(tmp_path)))
    with pytest.raises((ConfigError, DataError), match=expected) as caught:
        launch(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_found_late_is_one_line_too(files, tmp_path):
    """The same way out of the process for errors in the data as for those in the keys."""
    bad = rows(tmp_path / "bad.jsonl", *[{"prompt": "x"}] * 9, {"quest": "x"})
    done = command("spo", overrides(files, "spo", tmp_path / "out", train_data__path=bad))
    assert done.returncode == 1
    assert the_line(done.stderr).startswith(f"DataError: train_data.path: {bad}:10: row without")
    assert "Traceback" not in done.stderr


def test_the_cases_start_from_a_config_that_is_good(files, tmp_path):
    config = composed("spo", overrides(files, "spo", tmp_path))
    assert OmegaConf.missing_keys(config) == set()
    assert issubclass(ConfigError, RL2Error)


def test_a_named_checkpoint_that_cannot_be_read_is_not_said_to_be_none(files, tmp_path):
    (tmp_path / "step000001").symlink_to("step000001")
    with pytest.raises(ConfigError, match="step000001: cannot be read .Too many levels of sym"):
        launch(
            composed(
                "sft",
                overrides(
                    files, "sft", tmp_path / "run",
                    trainer__load_ckpt_from=tmp_path / "step000001",
                ),
            )
        )  # fmt: skip
