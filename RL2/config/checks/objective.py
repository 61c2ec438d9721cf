"""What is trained on: loss, KL, importance sampling, advantages, and options without effect."""

from omegaconf import DictConfig

from RL2.config.flat import as_text
from RL2.config.models import check_model
from RL2.runtime.errors import ConfigError

CLIPPED_LOSSES = ("ppo", "gspo", "gspo_token", "gmpo", "clip_cov", "entropy_80_20")
"""The losses that take both clips, which `actor.clip` sets."""

# Options of built-in estimators: the value that says nothing, and those that take it.
_OPTIONS = {
    "gamma": (1.0, ("gae", "reinforce_pp")),
    "lamda": (1.0, ("gae",)),
    "global_norm": (False, ("reinforce",)),
    "norm_var": (False, ("reinforce",)),
    "k": (None, ("pass_k",)),
}
_OF_GROUPS = ("rloo", "opo", "reinforce_pp_baseline", "maxrl", "pass_k", "gdpo")
_WITHOUT_KL = {
    "maxrl": "divides by mean rewards, which a KL makes negative",
    "gdpo": "reads rollout.rewards, which hold no KL",
}


def check_importance(actor: DictConfig, rollout: DictConfig) -> None:
    if actor.tis_type == "truncate":
        return
    if actor.tis_coef == 0 or actor.tis_coef < 1 and not actor.tis_type.endswith("truncate"):
        advice = "has no effect with" if actor.tis_coef == 0 else "leaves no token with"
        raise ConfigError(
            f"actor.tis_type={actor.tis_type}: {advice} actor.tis_coef={actor.tis_coef}; set "
            "actor.tis_coef to 1 or more, such as 2"
        )


def check_kl(actor: DictConfig, rollout: DictConfig) -> None:
    kl = actor.kl
    if kl.coef > 0 and kl.type is None:
        raise ConfigError(
            f"actor.kl.coef={kl.coef}: has no effect without actor.kl.type; use loss, reward or "
            "advantage"
        )
    if kl.type is not None and kl.coef == 0:
        raise ConfigError(
            f"actor.kl.type={kl.type}: has no effect with actor.kl.coef=0; set "
            "actor.kl.coef above 0"
        )


def check_kl_of_loss(actor: DictConfig, rollout: DictConfig) -> None:
    kl = actor.kl
    for name in ("avg_level", "unbiased"):
        if kl[name] and kl.type != "loss":
            has = "without actor.kl.type" if kl.type is None else f"with actor.kl.type={kl.type}"
            raise ConfigError(
                f"actor.kl.{name}={as_text(kl[name])}: has no effect {has}; use "
                "actor.kl.type=loss, or leave it out"
            )
    if kl.clamp is not None and kl.type is None:
        raise ConfigError(
            f"actor.kl.clamp={kl.clamp}: has no effect without actor.kl.type; set actor.kl.coef "
            "and actor.kl.type, or leave it out"
        )


def check_renewal(ref_actor: DictConfig) -> None:
    if ref_actor.renew_mix != 1 and ref_actor.renew_every == 0:
        raise ConfigError(
            f"ref_actor.renew_mix={ref_actor.renew_mix}: has no effect with "
            "ref_actor.renew_every=0; set that, or leave it out"
        )


def check_reference(actor: DictConfig, ref_actor: DictConfig) -> None:
    """Whether it is used, only the loss says (`RL2.algorithms.algorithm`)."""
    if ref_actor.model_name != actor.model_name:
        check_model(ref_actor, "ref_actor")


def check_clip(actor: DictConfig, rollout: DictConfig) -> None:
    named = actor.loss.name if actor.loss.import_path is None else None
    if actor.clip is not None and named is not None and named not in CLIPPED_LOSSES:
        raise ConfigError(
            f"actor.clip={actor.clip}: has no effect with actor.loss.name={actor.loss.name}; "
            "leave it out"
        )


def check_advantages(
    adv: DictConfig, train_data: DictConfig, actor: DictConfig, rollout: DictConfig
) -> None:
    if adv.import_path is not None:  # only its file says which options it takes
        return
    name, chosen = adv.estimator, f"adv.estimator={adv.estimator}"
    for option, (unset, estimators) in _OPTIONS.items():
        if adv[option] != unset and name not in estimators:
            others = " or ".join(f"adv.estimator={one}" for one in estimators)
            raise ConfigError(
                f"adv.{option}={str(adv[option]).lower()}: has no effect with {chosen}; leave it "
                f"out, or use {others}"
            )
    n = train_data.responses_per_prompt
    if name in _OF_GROUPS and n < 2:
        raise ConfigError(
            f"{chosen}: compares the samples of a prompt, and there is one; set "
            "train_data.responses_per_prompt to 2 or more"
        )
    if adv.k is not None and adv.k > n:
        raise ConfigError(
            f"adv.k={adv.k}: more attempts than samples of a prompt, "
            f"train_data.responses_per_prompt={n}; lower it, or raise that"
        )
    if name in _WITHOUT_KL and actor.kl.type == "reward":
        raise ConfigError(
            f"actor.kl.type=reward: {chosen} {_WITHOUT_KL[name]}; use actor.kl.type=loss"
        )
    if name == "gdpo" and rollout.overlong_buffer:
        raise ConfigError(
            f"rollout.overlong_buffer={rollout.overlong_buffer}: lowers the single reward, which "
            f"{chosen} does not read; leave it out"
        )


def check_ratio(actor: DictConfig, train_data: DictConfig) -> None:
    if actor.max_ratio is not None and actor.update_per_rollout * actor.epochs_per_rollout == 1:
        raise ConfigError(
            f"actor.max_ratio={actor.max_ratio}: has no effect with one optimizer step on a "
            "rollout, where the ratio is 1; set actor.update_per_rollout or "
            "actor.epochs_per_rollout, or leave it out"
        )


def check_updates(actor: DictConfig, critic: DictConfig, train_data: DictConfig) -> None:
    samples = train_data.prompts_per_rollout * train_data.responses_per_prompt
    for group, node in (("actor", actor), ("critic", critic)):
        if samples % node.update_per_rollout:
            raise ConfigError(
                f"{group}.update_per_rollout={node.update_per_rollout}: must divide the {samples} "
                "samples of a rollout (train_data.prompts_per_rollout * responses_per_prompt)"
            )


def check_sft_average(actor: DictConfig, data: DictConfig) -> None:
    if actor.avg_level == "correct":
        raise ConfigError(
            "actor.avg_level=correct: every sequence of data.path counts as correct; use token or "
            "sequence"
        )
