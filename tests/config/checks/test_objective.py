"""What is trained on, and options without effect."""

from RL2.config import validate


def test_masked_importance_weights_need_a_band(message, composed):
    text = message("spo", "actor.tis_type=mask")  # spo has none of it
    assert text.startswith("actor.tis_type=mask: has no effect with actor.tis_coef=0.0; set ")
    text = message("ppo", "actor.tis_type=mask", "actor.tis_coef=0.5")
    assert text.startswith("actor.tis_type=mask: leaves no token with actor.tis_coef=0.5; set ")
    validate(composed("ppo", "actor.tis_type=mask"), 1)
    text = message("spo", "actor.tis_type=sequence_truncate")
    assert text.startswith("actor.tis_type=sequence_truncate: has no effect with actor.tis_coef=0")
    validate(composed("ppo", "actor.tis_type=geometric_truncate", "actor.tis_coef=0.5"), 1)


def test_options_without_effect(message, composed):
    assert "without actor.kl.type" in message("ppo", "actor.kl.coef=0.1")
    assert "with actor.kl.coef=0" in message("ppo", "actor.kl.type=loss")
    text = message("spo", "actor.clip=0.2")
    assert text.startswith("actor.clip=0.2: has no effect with actor.loss.name=max_target_kl")
    for setting in ("adv.norm_var=true", "adv.global_norm=true", "adv.gamma=0.9", "adv.lamda=0.9"):
        assert message("spo", setting).startswith(
            f"{setting}: has no effect with adv.estimator=spo"
        )
    assert "without test_data.path" in message("spo", "trainer.test_freq=5")
    assert "without trainer.test_freq" in message("spo", "test_data.path=test@openai/gsm8k:main")
    text = message("ppo", "trainer.test_sampled=true")
    assert text.startswith(
        "trainer.test_sampled=true: has no effect without trainer.test_freq; set"
    )
    assert message("sft", "actor.avg_level=correct").startswith("actor.avg_level=correct: every")
    for kind in ("loss", "reward", "advantage"):
        overrides = (f"actor.kl.type={kind}", "actor.kl.coef=0.1", "ref_actor.model_name=a/b")
        validate(composed("ppo", *overrides), 1)


def test_update_per_rollout(message, composed):
    text = message("ppo", "actor.update_per_rollout=3", "train_data.responses_per_prompt=2")
    assert text.startswith("actor.update_per_rollout=3: must divide the 16 samples")
    validate(composed("ppo", "actor.update_per_rollout=4"), 1)


def test_options_of_the_kl_of_the_loss(message, composed):
    text = message("ppo", "actor.kl.unbiased=true")
    assert text.startswith("actor.kl.unbiased=true: has no effect without actor.kl.type; use actor")
    reward = ("actor.kl.coef=0.1", "actor.kl.type=reward")
    text = message("ppo", *reward, "actor.kl.avg_level=sequence_sum")
    assert text.startswith("actor.kl.avg_level=sequence_sum: has no effect with actor.kl.type=rewa")
    assert "without actor.kl.type; set" in message("ppo", "actor.kl.clamp=10")
    validate(composed("ppo", *reward, "actor.kl.clamp=10"), 1)
    loss = ("actor.kl.coef=0.1", "actor.kl.type=loss", "actor.kl.avg_level=sequence_sum")
    validate(composed("ppo", *loss, "actor.kl.unbiased=true", "ref_actor.renew_every=3"), 1)
    text = message("ppo", "ref_actor.renew_mix=0.5")
    assert text.startswith("ref_actor.renew_mix=0.5: has no effect with ref_actor.renew_every=0; ")


def test_a_guard_of_one_update(message, composed):
    text = message("ppo", "actor.max_ratio=10")
    assert text.startswith("actor.max_ratio=10.0: has no effect with one optimizer step on a roll")
    validate(composed("ppo", "actor.max_ratio=10", "actor.epochs_per_rollout=2"), 1)


def test_estimators_of_groups(message, composed):
    assert message("ppo", "adv.estimator=rloo", "train_data.responses_per_prompt=1") == (
        "adv.estimator=rloo: compares the samples of a prompt, and there is one; set "
        "train_data.responses_per_prompt to 2 or more"
    )
    pass_k = ("adv.estimator=pass_k", "train_data.responses_per_prompt=4")
    assert message("ppo", *pass_k, "adv.k=5").startswith(
        "adv.k=5: more attempts than samples of a prompt, train_data.responses_per_prompt=4; "
    )
    assert (
        message("ppo", *pass_k, "adv.k=1")
        == "adv.k=1: must be 2 or more; k=1 is adv.estimator=rloo"
    )
    assert message("ppo", "adv.k=2") == (
        "adv.k=2: has no effect with adv.estimator=reinforce; leave it out, or use "
        "adv.estimator=pass_k"
    )
    kl = ("actor.kl.type=reward", "actor.kl.coef=0.1")
    assert message("ppo", *kl, "adv.estimator=maxrl", "train_data.responses_per_prompt=4") == (
        "actor.kl.type=reward: adv.estimator=maxrl divides by mean rewards, which a KL makes "
        "negative; use actor.kl.type=loss"
    )
    gdpo = ("adv.estimator=gdpo", "train_data.responses_per_prompt=4", "rollout.rewards={a: 1}")
    assert "which hold no KL" in message("ppo", *gdpo, *kl)
    assert "which adv.estimator=gdpo does not read" in message(
        "ppo", *gdpo, "rollout.overlong_buffer=8"
    )
    assert message("ppo", "rollout.rewards={a: inf}").startswith("rollout.rewards.a=inf: must be ")
    validate(composed("ppo", *gdpo), 1)
    validate(composed("ppo", *pass_k, "adv.k=4"), 1)
    validate(composed("ppo", "adv.estimator=reinforce_pp", "adv.gamma=0.9"), 1)
