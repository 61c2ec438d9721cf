"""`actor`: the model that is trained, its loss and its optimizer."""

import math
from dataclasses import dataclass
from typing import Any

from RL2.config.schema.choices import Divergence, KLType, Scheduler
from RL2.config.schema.keys import (
    ABOVE_ZERO,
    FRACTION,
    FROM_ONE,
    FROM_ZERO,
    PROBABILITY,
    SEED,
    Range,
    by_trainer,
    follow,
    group,
    key,
    required,
)
from RL2.config.schema.model import ModelConfig


@dataclass
class KLConfig:
    coef: float = key(
        0.0, "weight of the KL divergence from ref_actor; 0: no reference is loaded", FROM_ZERO
    )
    type: KLType | None = key(
        None, "where the KL is applied: loss | reward | advantage; needs coef > 0"
    )
    reward_estimator: str = key("k1", "KL estimator for the types reward and advantage")
    loss_estimator: str = key("k2", "KL estimator for the type loss")
    clamp: float | None = key(
        None,
        "estimates of the KL are clamped to 0 ... this, token by token; null: they are not",
        ABOVE_ZERO,
    )
    avg_level: str | None = key(
        None, "type loss: what the summed KL is divided by; null: as actor.avg_level"
    )
    unbiased: bool = key(
        False,
        "type loss: multiply the KL by the ratio exp(logps - old_logps), with its gradient, which "
        "then is that of KL(policy || reference) without bias",
    )


@dataclass
class EntropyConfig:
    coef: float = key(
        0.0,
        "weight of the entropy bonus; a negative one slows the growth of entropy",
        Range(math.isfinite, "be finite"),
    )


@dataclass
class LoRAConfig:
    rank: int | None = key(
        None,
        "train adapters of this rank (LoRA) beside frozen weights, such as 16, with about ten "
        "times the lr; null: train all weights",
        FROM_ONE,
    )
    alpha: int = key(32, "adapters are scaled by alpha / rank", FROM_ONE)
    dropout: float = key(
        0.0,
        "dropout on the adapters' inputs",
        Range(lambda x: 0 <= x < 1, "be 0 or more and below 1"),
    )
    target_modules: Any = key(
        "all-linear",
        "layers that get adapters: all-linear (every linear layer, except the head and experts "
        "that are fused in one parameter) | names, such as [q_proj,v_proj]",
        takes="text or list of texts",
    )
    seed: int = follow("trainer.seed", "seed of the adapters' initial weights", SEED)


@dataclass
class LossChoice:
    """A loss, and options of a user's own."""

    name: str = by_trainer(
        "the loss (see docs/algorithms.md)", own="actor.loss.import_path=my_loss.py:my_loss"
    )
    import_path: str | None = key(
        None,
        "your own loss (file.py:function or package.module:function), used instead of name",
        code=True,
    )
    options: dict[str, Any] = key(
        {}, "keyword arguments for your own loss, e.g. actor.loss.options.beta=0.1"
    )


@dataclass
class LossConfig(LossChoice):
    detach_target: bool | None = key(
        "${for_loss:max_target_kl,false,rank_jsd,true}",
        "max_target_kl, rank_jsd: no gradient through the target (false for max_target_kl "
        "reproduces the thesis)",
    )
    target: float | None = key(
        "${for_loss:fixed_target_kl,0.5}",
        "fixed_target_kl: q of the target (q, 1 - q)",
        Range(lambda x: 0 < x < 1, "lie between 0 and 1"),
    )
    gate: bool | None = key(
        "${for_loss:fixed_target_kl,true}",
        "fixed_target_kl: only tokens with probability above the target",
    )
    max_rank: int | None = key(
        "${for_loss:rank_jsd,8}",
        "rank_jsd: how many of the most likely tokens are used; a less likely token counts as the "
        "next rank",
        FROM_ONE,
    )
    rest: bool | None = key(
        None,
        "topk_kl, topk_jsd: what teacher and student give to all other tokens counts as one more "
        "event (null, true), or both are divided by their sums over the k tokens (false)",
    )
    jsd_beta: float | None = key(
        None,
        "topk_jsd: weight of the teacher in the mixture, 0 (KL from the teacher) to 1 (KL to it); "
        "null: 0.5",
        FRACTION,
    )


@dataclass
class RLLossConfig(LossConfig):
    clip_low: float | None = follow(
        "actor.clip",
        "losses with a clip: the ratio is clipped below at 1 - clip_low (gmpo: e^-clip_low)",
        ABOVE_ZERO,
    )
    clip_high: float | None = follow(
        "actor.clip",
        "losses with a clip: the ratio is clipped above at 1 + clip_high (gmpo: e^clip_high)",
        ABOVE_ZERO,
    )
    dual_clip: float | None = key(
        None,
        "ppo: the loss of a token with a negative advantage A is at most -dual_clip * A; null: no "
        "such bound",
        Range(lambda x: 1 < x < math.inf, "be above 1"),
    )
    tau_pos: float | None = key(
        None, "sapo: steepness of the gate where the advantage is above 0; null: 1.0", ABOVE_ZERO
    )
    tau_neg: float | None = key(
        None, "sapo: steepness of the gate elsewhere; null: 1.05", ABOVE_ZERO
    )
    divergence: Divergence | None = key(
        None, "dppo: how far a token has moved, tv (|p_old - p|) or kl (binary KL); null: tv"
    )
    max_divergence: float | None = key(
        None,
        "dppo: divergence beyond which a token counts no more; null: 0.15 for tv, 0.05 for kl",
        FROM_ZERO,
    )
    max_ratio: float | None = key(
        None,
        "dppo: bound on the ratio; null: 20",
        Range(lambda x: 1 <= x < math.inf, "be 1 or more"),
    )
    share: float | None = key(
        None,
        "clip_cov, kl_cov, entropy_80_20: share of a batch's tokens that are selected; null: 2e-4, "
        "2e-3, 0.2",
        PROBABILITY,
    )
    min_covariance: float | None = key(
        None,
        "clip_cov: selected tokens have a covariance above this; null: 1.0",
        Range(math.isfinite, "be finite"),
    )
    max_covariance: float | None = key(
        None,
        "clip_cov: selected tokens have a covariance below this; null: 5.0",
        Range(math.isfinite, "be finite"),
    )
    kl_weight: float | None = key(
        None, "kl_cov: weight of the KL penalty at selected tokens; null: 1.0", FROM_ZERO
    )


@dataclass
class TrainedModelConfig(ModelConfig):
    """A model with its optimizer."""

    dropout: float | None = key(
        0.0,
        "dropout and router noise in updates: 0 (none, so that updates see the policy that "
        "sampled) | null (what the model's config says)",
        Range(lambda x: x == 0, "be 0 (none) or null (what the model's config says)"),
    )
    gradient_checkpointing: bool = key(True, "recompute activations in backward to save memory")
    offload_activations: bool = key(
        False, "keep activations in CPU memory between forward and backward (CUDA)"
    )
    compile: bool = key(
        False, "torch.compile of the decoder layers; takes a minute or two at the start"
    )
    max_length_per_device: int = required(
        "the tokens of one forward on a rank, at least the longest prompt + response, such as 8576",
        "tokens in one training forward on a rank; times sp_size, this must be at least the "
        "longest prompt + response",
        FROM_ONE,
    )
    avg_level: str = by_trainer("what the summed loss is divided by")
    # The bounds of lr and weight_decay are far from all usual values: they catch slips such as 1e4.
    lr: float = key(
        1e-6,
        "peak learning rate of AdamW",
        Range(
            lambda x: 0 < x < 1,
            "be above 0 and below 1",
            ", as AdamW moves each weight by about that much per step; give a rate such as 1e-6",
        ),
    )
    weight_decay: float = key(
        1e-2,
        "decoupled weight decay of AdamW",
        Range(lambda x: 0 <= x <= 10, "be 0 to 10", "; give one such as 1e-2"),
    )
    betas: list[float] = key(
        [0.9, 0.999],
        "AdamW's decay rates of the means of gradients and of their squares",
        Range(
            lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x),
            "be two numbers, 0 or more and below 1",
            ", such as [0.9,0.95]",
        ),
    )
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", ABOVE_ZERO)
    scheduler: Scheduler = key(
        Scheduler.constant,
        "learning rate after the warm-up: constant (also called constant_with_warmup) | linear | "
        "cosine | cosine_with_restarts | polynomial | inverse_sqrt | warmup_stable_decay",
    )
    warmup_ratio: float = key(
        0.1,
        "fraction of all optimizer steps over which the learning rate rises from 0",
        FRACTION,
    )
    decay_ratio: float | None = key(
        None,
        "warmup_stable_decay: fraction of all optimizer steps, the last ones, over which the "
        "learning rate falls (0.1)",
        PROBABILITY,
    )
    min_lr_ratio: float = key(
        0.0, "the learning rate falls to this fraction of lr, not to 0", FRACTION
    )
    freeze_steps: int = key(
        0, "first steps without training: they only generate (sft: only read data)", FROM_ZERO
    )
    offload_optimizer: bool = key(
        False, "keep AdamW's moments in CPU memory between updates (CUDA)"
    )
    entropy: EntropyConfig = group(EntropyConfig)
    lora: LoRAConfig = group(LoRAConfig)


@dataclass
class SFTActorConfig(TrainedModelConfig):
    loss: LossConfig = group(LossConfig)


@dataclass
class ActorConfig(TrainedModelConfig):
    temperature: float = follow(
        "rollout.train_sampling_params.temperature", "divides the logits in training", ABOVE_ZERO
    )
    max_inference_length_per_device: int = follow(
        "actor.max_length_per_device", "tokens in one forward without gradients", FROM_ONE
    )
    update_per_rollout: int = key(
        1, "optimizer steps on each rollout, in each pass over it", FROM_ONE
    )
    epochs_per_rollout: int = key(
        1,
        "passes over each rollout; with several, its samples are shuffled for each of them",
        FROM_ONE,
    )
    max_ratio: float | None = key(
        None,
        "an optimizer step is left out if the mean of exp(logps - old_logps) over its action "
        "tokens is larger, such as 10; null: never",
        Range(lambda x: 1 < x < math.inf, "be above 1"),
    )
    clip: float | None = key(
        "${for_loss:ppo,0.2}",
        "clip range, both sides, of a loss with a clip (0.2 for ppo; null: the loss's own)",
        ABOVE_ZERO,
    )
    tis_coef: float = key(
        2.0,
        "importance sampling between engine and trainer, both before the first update: bound C on "
        "the ratio, 1 or more for all types but those that truncate; 0: off",
        FROM_ZERO,
    )
    tis_type: str = key(
        "truncate",
        "weights from ratios; those of whole sequences take one more forward of a rollout",
    )
    kl: KLConfig = group(KLConfig)
    loss: RLLossConfig = group(RLLossConfig)
