"""Keys that there are, each with a value in its range."""

import pytest
from omegaconf import OmegaConf

from RL2.config import validate
from RL2.runtime.errors import ConfigError
from tests.config.support import RL_REQUIRED, SFT_REQUIRED


@pytest.mark.parametrize("name", ["ppo", "spo", "spo_0p5", "sft"])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_required_keys_are_enough(composed, name, world_size):
    config = composed(name)
    before = config.copy()
    validate(config, world_size)
    assert config == before


@pytest.mark.parametrize(
    ("name", "override"),
    [("spo", line) for line in RL_REQUIRED] + [("sft", line) for line in SFT_REQUIRED],
)
def test_required(message, name, override):
    key = override.partition("=")[0]
    assert message(name, f"{key}='???'").startswith(f"{key}: required; give ")


@pytest.mark.parametrize(
    "override",
    [
        "train_data.prompts_per_rollout=0",
        "test_data.max_examples=0",
        "actor.lr=0.0",
        "actor.lr=nan",
        "actor.lr=inf",
        "actor.lr=10000.0",
        "actor.lr=1.0",
        "actor.weight_decay=10000.0",
        "rollout.train_sampling_params.temperature=10000.0",
        "rollout.test_sampling_params.temperature=10000.0",
        "actor.weight_decay=-1.0",
        "actor.warmup_ratio=1.5",
        "actor.max_grad_norm=0.0",
        "actor.tis_coef=-1.0",
        "actor.kl.coef=-0.5",
        "actor.entropy.coef=nan",
        "actor.update_per_rollout=0",
        "actor.tp_size=0",
        "rollout.servers_per_node=0",
        "rollout.server_start_timeout=0.0",
        "rollout.request_timeout=0.0",
        "rollout.request_retries=-1",
        "rollout.max_restarts=-1",
        "actor.loss.target=1.0",
        "actor.loss.max_rank=0",
        "actor.clip=0.0",
        "rollout.train_sampling_params.temperature=0.0",
        "rollout.test_sampling_params.temperature=-0.1",
        "rollout.train_sampling_params.top_p=0.0",
        "rollout.test_sampling_params.top_p=1.1",
        "rollout.train_sampling_params.max_new_tokens=0",
        "rollout.gpu_memory_utilization=30.0",
        "rollout.base_port=99999",
        "rollout.env_timeout=0.0",
        "rollout.max_env_errors=-1.0",
        "rollout.max_malformed=-1.0",
        "rollout.max_in_flight=0",
        "rollout.max_resampled=-1",
        "rollout.over_sampling=0",
        "actor.dropout=0.1",
        "rollout.staleness=2",
        "rollout.staleness=-1",
        "rollout.llm_kl_alarm=0.0",
        "trainer.n_epochs=0",
        "trainer.max_steps=0",
        "trainer.save_freq=-1",
        "trainer.test_freq=0",
        "trainer.seed=-1",
        "trainer.health.patience=0",
        "trainer.health.no_signal_steps=0",
        "trainer.health.min_entropy=-1.0",
        "trainer.health.max_entropy=0.0",
        "trainer.health.max_p_max=1.1",
        "trainer.health.min_length_ratio=0.0",
        "trainer.health.max_llm_kl=0.0",
    ],
)
def test_ranges(message, override):
    assert f"{override}: must " in message("spo", override)


def test_keys_added_past_the_types(composed):
    config = composed("spo", "+actor.learning_rates=1")
    with pytest.raises(ConfigError, match="actor.learning_rates: unknown key"):
        validate(config, 1)
    config = composed("spo")
    OmegaConf.update(config, "rollout.train_sampling_params.topp", 1.0, force_add=True)
    with pytest.raises(ConfigError, match="did you mean rollout.train_sampling_params.top_p"):
        validate(config, 1)
    validate(composed("spo", "+actor.loss.options.beta=1"), 1)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("actor.lr='${nope}'", "actor.lr=${nope}"),
        ("actor.lr='${actor.lr}'", "actor.lr=${actor.lr}"),
        ("actor.lr='${trainer.project}'", "actor.lr=${trainer.project}"),
        ("trainer.project='${oc.env:NOT_THERE}'", "trainer.project=${oc.env:NOT_THERE}"),
        ("trainer.project='${nope:1}'", "trainer.project=${nope:1}"),
        ("rollout.server_args=['${nope}']", "rollout.server_args.0=${nope}"),
        ("actor.loss.options={a:'${nope}'}", "actor.loss.options.a=${nope}"),
    ],
)
def test_interpolations_that_lead_nowhere(message, override, key):
    text = message("spo", override)
    assert text.startswith(f"{key}: does not resolve (") and "name a key that has a value" in text


def test_numbers_that_fit_nowhere(message):
    for key in ("trainer.seed", "actor.lora.seed"):
        assert "must be 0 to 4294967295" in message("spo", f"{key}=4294967296")
    assert "must be 1 to 1024" in message("spo", "trainer.num_threads=1000000")
    text = message("spo", "actor.weight_decay=???")
    assert text.startswith("actor.weight_decay=???: required; give a value")
