"""Keys and values of other libraries get the way out."""

import pytest

from RL2.config import check_overrides
from RL2.config.elsewhere import KEYS, VALUES, key_here
from RL2.config.schema import RLConfig, SFTConfig, key_types
from RL2.runtime.errors import ConfigError
from RL2.trainer.registries import registry_of

RL, SFT = key_types(RLConfig), key_types(SFTConfig)


def message(line, name="spo"):
    with pytest.raises(ConfigError) as caught:
        check_overrides(name, [line], registry_of)
    return str(caught.value)


@pytest.mark.parametrize("name", KEYS)
def test_every_name_leads_to_a_key_that_exists(name):
    for one in KEYS[name].split(" | "):
        key = one.partition(", ")[0]
        assert one.startswith("- ") or key in RL or key in SFT, key
    # A key of our own is never called by another name.
    if name != "top_k":  # of a teacher; in sampling there is none
        assert not any(key.endswith(f".{name}") and key_here(key, RL) is not None for key in RL)


@pytest.mark.parametrize("name", VALUES)
def test_every_value_is_of_a_key_that_exists(name):
    assert any(key.endswith(f".{name}") for key in RL)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("actor.learning_rate=1e-6", "unknown key; here that is actor.lr"),
        ("+learning_rate=1e-6", "unknown key; here that is actor.lr"),
        ("actor_rollout_ref.rollout.n=8", "here that is train_data.responses_per_prompt"),
        ("training_args.num-train-epochs=1", "here that is trainer.n_epochs"),
        ("algorithm.adv_estimator=grpo", "here that is adv.estimator"),
        ("beta=0.04", "here that is actor.kl.coef (with actor.kl.type=loss)"),
        ("rollout.train_sampling_params.top_k=20", "there is none for it, as tokens are drawn "),
        ("rollout.train_sampling_params.min_p=0.1", "there is none for it, as tokens are drawn "),
        ("actor.optim.adam_betas=[0.9,0.95]", "here that is actor.betas"),
        ("actor.adam_epsilon=1e-6", "there is none for it, as AdamW's epsilon is that of"),
        ("trainer.nnodes=2", "there is none for it, as torchrun sets it: --nnodes"),
        ("actor.loss.gamma=2", "an option of your own loss is actor.loss.options.gamma"),
        ("actor.loss.gates=true", "did you mean actor.loss.gate? an option of your own loss"),
        ("--learning_rate=1e-6", "without dashes (here that is actor.lr), and --help"),
        ("--nproc_per_node=2", "a key is set by key=value without dashes, and --help"),
        ("adv.estimator=grpo", "GRPO is reinforce with adv.norm_var=true"),
        ("adv.estimator=RLOO", "which is RLOO times (n - 1) / n; use reinforce, spo, gae"),
        ("adv.estimator=ppo", "PPO's with a critic is gae; use"),
        ("actor.dtype=bf16", "actor.dtype=bf16: that is bfloat16; use auto, "),
        ("ref_actor.dtype=fp16", "fp16 would need loss scaling"),
        ("actor.avg_level=token-mean", "that is token; use token, sequence or correct"),
        ("actor.kl.loss_estimator=low_var_kl", "that is k3; use k1, k2 or k3"),
        ("rollout.engine=hf", "that is transformers; use "),
    ],
)
def test_the_way_out(line, said):
    assert said in message(line), message(line)


def test_each_trainer_has_its_own_keys():
    assert "train_data.prompts_per_rollout" in message("train_batch_size=4")
    assert "data.batch_size" in message("train_batch_size=4", "sft")
    assert "here that is" not in message("num_generations=4", "sft")
