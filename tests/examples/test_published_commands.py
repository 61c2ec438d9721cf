"""The published commands, and those in `examples/`, compose and pass all checks as they are."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from RL2.config import apply_fallbacks, check_overrides, validate
from RL2.config.schema import RLConfig, key_types
from RL2.trainer.registries import registry_of
from tests.config.support import compose_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["reinforce", "0", "0_1", "correct", "0p5_0", "0p5_0_1", "0p5_test"]

COMMON = r"""
    test_data.path=test@openai/gsm8k:main \
    actor.model_name=Qwen/Qwen3-4B-Thinking-2507 \
    actor.use_liger_kernel=true \
    actor.max_length_per_device=8576 \
    rollout.train_sampling_params.max_new_tokens=8192 \
    rollout.env_path=envs/gsm8k.py \
    rollout.gpu_memory_utilization=0.3 \
    trainer.project=GSM8K \
    trainer.n_epochs=150 \
    trainer.save_freq=20 \
    trainer.test_freq=5 \
    train_data.path=train@openai/gsm8k:main
"""
BASELINE = r"""
    train_data.prompts_per_rollout=128 \
    train_data.responses_per_prompt=4 \
    test_data.prompts_per_rollout=128 \
    test_data.responses_per_prompt=4 \
    adv.estimator=reinforce \
    trainer.experiment_name=baseline_drgrpo
"""
PATHS = r"""
    train_data.prompts_per_rollout=512 \
    train_data.responses_per_prompt=1 \
    test_data.prompts_per_rollout=512 \
    test_data.responses_per_prompt=1 \
    actor.avg_level=sequence \
    actor.entropy.coef=0
"""


def command(trainer: str, *parts: str) -> str:
    return " \\\n".join([f"torchrun \\\n --nproc_per_node=1 \\\n -m RL2.trainer.{trainer}", *parts])


PUBLISHED = {
    "baseline": command("ppo", COMMON.strip(), BASELINE.strip()),
    "section 3.1": command(
        "spo", COMMON.strip(), PATHS.strip(), "trainer.experiment_name=section_3.1_batch_normalized"
    ),
    "section 3.3": command(
        "spo_0p5", COMMON.strip(), PATHS.strip(), "trainer.experiment_name=section_3.3_fixed_target"
    ),
}


def script(name: str) -> str:
    # `_active.sh` makes $ROOT the repository: the scripts work from any folder.
    return (ROOT / "examples" / f"gsm8k_{name}.sh").read_text().replace('"$ROOT/envs', '"envs')


def parse(text: str) -> tuple[str, list[str]]:
    """Trainer and overrides of the one torchrun command in a text."""
    (found,) = re.findall(r"^torchrun (?:.*\\\n)*.*", text, re.MULTILINE)
    words = [word for word in shlex.split(found.replace("\\\n", " ")) if word != "$@"]
    at = words.index("-m")
    return words[at + 1].removeprefix("RL2.trainer."), words[at + 2 :]


@cache
def checked(text: str) -> DictConfig:
    name, overrides = parse(text)
    check_overrides(name, overrides, registry_of)
    config = compose_config(name, overrides)
    validate(config, 1)
    OmegaConf.set_readonly(config, True)
    return config


def warnings(text: str, cuda: bool, available: set[str]) -> list[str]:
    config = checked(text).copy()
    OmegaConf.set_readonly(config, False)
    return apply_fallbacks(config, cuda, available)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


ALL = {**PUBLISHED, **{name: script(name) for name in SCRIPTS}}


@pytest.mark.parametrize("text", ALL.values(), ids=ALL.keys())
def test_composes_and_validates(text):
    config = checked(text)
    assert config.train_data.path == "train@openai/gsm8k:main"
    assert config.actor.model_name == config.rollout.model_name == "Qwen/Qwen3-4B-Thinking-2507"
    assert config.rollout.test_sampling_params.temperature == 0
    assert config.rollout.responses_per_prompt == config.train_data.responses_per_prompt
    assert config.actor.temperature == 1.0
    assert config.actor.lr == 1e-6


@pytest.mark.parametrize("text", ALL.values(), ids=ALL.keys())
def test_one_warning_for_each_thing_that_needs_cuda(text):
    assert warnings(text, False, set()) == [
        "actor.use_liger_kernel=true: needs CUDA; running without it",
        "rollout.gpu_memory_utilization=0.3: needs CUDA; ignored",
    ]
    everything = {"liger_kernel", "flash_attn", "sglang"}
    assert warnings(text, True, everything) == []
    # the embedded engine is not made for these, and takes no share of the memory
    engine, memory = warnings(text, True, everything - {"sglang"})
    assert engine.startswith("rollout.engine=auto: neither sglang nor vllm is installed")
    assert memory.startswith("rollout.gpu_memory_utilization=0.3:")


def settings(text: str) -> tuple:
    config = checked(text)
    actor = config.actor
    return (
        actor.loss.name,
        config.adv.estimator,
        actor.avg_level,
        actor.entropy.coef,
        actor.tis_coef,
        config.train_data.prompts_per_rollout,
        config.train_data.responses_per_prompt,
    )


def test_settings_of_the_experiments():
    assert settings(PUBLISHED["baseline"]) == ("ppo", "reinforce", "token", 0, 2, 128, 4)
    assert settings(PUBLISHED["section 3.1"]) == ("max_target_kl", "spo", "sequence", 0, 0, 512, 1)
    assert settings(PUBLISHED["section 3.3"]) == (
        "fixed_target_kl", "spo", "sequence", 0, 0, 512, 1,
    )  # fmt: skip
    assert settings(script("correct")) == ("max_target_kl", "spo", "correct", 0, 0, 512, 1)
    assert settings(script("0_1")) == ("max_target_kl", "spo", "sequence", -0.1, 0, 512, 1)
    assert settings(script("0p5_0_1")) == ("fixed_target_kl", "spo", "sequence", -0.1, 0, 512, 1)
    assert settings(script("0p5_test"))[5:] == (16, 1)


@pytest.mark.parametrize(
    ("name", "published"),
    [("reinforce", "baseline"), ("0", "section 3.1"), ("0p5_0", "section 3.3")],
)
def test_scripts_hold_the_published_commands(name, published):
    trainer, overrides = parse(script(name))
    expected_trainer, expected = parse(PUBLISHED[published])
    assert (trainer, sorted(overrides)) == (expected_trainer, sorted(expected))


def test_scripts_differ_in_experiment_name_and_pass_overrides_on():
    names = {checked(script(name)).trainer.experiment_name for name in SCRIPTS}
    assert len(names) == len(SCRIPTS)
    for name in SCRIPTS:
        text = script(name)
        assert "set -euo pipefail" in text and text.rstrip().endswith('"$@"')
        assert '--nproc_per_node="${NPROC:-1}"' in text
        assert os.access(ROOT / "examples" / f"gsm8k_{name}.sh", os.X_OK)


# The keys that published commands rely on.
DOCUMENTED = {
    "train_data": "path prompts_per_rollout responses_per_prompt",
    "test_data": "path prompts_per_rollout responses_per_prompt",
    "actor": "model_name use_liger_kernel gradient_checkpointing ddp_size tp_size sp_size "
    "max_length_per_device max_inference_length_per_device temperature update_per_rollout clip "
    "avg_level lr weight_decay max_grad_norm tis_coef scheduler warmup_ratio freeze_steps "
    "offload_model offload_optimizer",
    "actor.kl": "coef type reward_estimator loss_estimator",
    "actor.entropy": "coef",
    "ref_actor": "model_name use_liger_kernel ddp_size tp_size sp_size "
    "max_inference_length_per_device temperature offload_model",
    "critic": "model_name gradient_checkpointing ddp_size tp_size sp_size max_length_per_device "
    "max_inference_length_per_device update_per_rollout clip avg_level lr weight_decay "
    "max_grad_norm scheduler warmup_ratio offload_model offload_optimizer",
    "rollout": "model_name dtype tp_size gpu_memory_utilization responses_per_prompt max_turns "
    "env_path dynamic_filtering base_port",
    "rollout.train_sampling_params": "temperature max_new_tokens stop no_stop_trim",
    "rollout.test_sampling_params": "temperature max_new_tokens stop no_stop_trim",
    "adv": "estimator gamma lamda global_norm norm_var",
    "trainer": "project experiment_name load_ckpt_from n_epochs test_freq save_dir save_freq "
    "use_wandb",
}


def test_documented_keys_exist():
    documented = {f"{group}.{key}" for group, keys in DOCUMENTED.items() for key in keys.split()}
    assert documented <= key_types(RLConfig).keys()


def test_cfg_job_prints_and_leaves_nothing_behind(tmp_path):
    trainer, overrides = parse(PUBLISHED["section 3.1"])
    done = subprocess.run(
        [sys.executable, "-m", f"RL2.trainer.{trainer}", *overrides, "--cfg", "job"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "experiment_name: section_3.1_batch_normalized" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
