"""`trainer`: the run itself, what it saves and logs, and when it stops."""

from dataclasses import dataclass

from RL2.config.schema.choices import Dtype
from RL2.config.schema.keys import (
    ABOVE_ZERO,
    FROM_ONE,
    FROM_ZERO,
    PROBABILITY,
    SEED,
    Range,
    by_trainer,
    group,
    key,
)


@dataclass
class HealthConfig:
    patience: int = key(
        10,
        "steps in a row that break a rule before it stops the run, where the rule has no number of "
        "its own",
        FROM_ONE,
    )
    no_signal_steps: int | None = key(
        50,
        "steps in a row in which no update changed the weights: all of them skipped "
        "(actor/skipped), not finite, or without a gradient",
        FROM_ONE,
    )
    min_entropy: float | None = key(
        None,
        "actor/entropy below which the policy has collapsed, in nats; null by default, as what is "
        "low depends on the task, and sft may learn its data by heart",
        ABOVE_ZERO,
    )
    max_entropy: float | None = key(
        None,
        "actor/entropy above which the policy writes noise; null by default, as an untrained "
        "model starts there, at the logarithm of its vocabulary",
        ABOVE_ZERO,
    )
    max_p_max: float | None = key(
        None,
        "actor/p_max above which the policy is sure of every token; null by default, as for "
        "min_entropy",
        PROBABILITY,
    )


@dataclass
class RLHealthConfig(HealthConfig):
    max_p_max: float | None = key(
        0.9999,
        "actor/p_max above which the policy is sure of every token; one that solves its task "
        "without any doubt stays below",
        PROBABILITY,
    )
    min_length_ratio: float | None = key(
        0.02,
        "train/avg_response_length, as a fraction of its mean over the first `patience` steps, "
        "below which responses have collapsed; cannot happen with short ones",
        PROBABILITY,
    )
    max_llm_kl: float | None = key(
        0.5,
        "rollout/llm_kl above which engine and trainer are two policies, ten times what "
        "rollout.llm_kl_alarm warns of",
        ABOVE_ZERO,
    )
    check_versions: bool | None = key(
        True,
        "stop at once where tokens were not written by the weights that the engine was given last "
        "(rollout.staleness=1: or those before; rollout.partial_rollout: or any older ones)",
    )


@dataclass
class TrainerConfig:
    source: str = by_trainer(
        "what a step learns from, also a class of your own (file.py:Class or package.module:Class)",
        code=True,
        own="my_source.py:MySource",
    )
    project: str = key("RL2", "project in wandb and other trackers")
    experiment_name: str = key("default", "name of the run in trackers and of its folder")
    load_ckpt_from: str | None = key(
        None, "resume from: null (start anew) | latest | folder of a checkpoint", path=True
    )
    n_epochs: int = key(1, "passes over the training data", FROM_ONE)
    max_steps: int | None = key(
        None, "stop after this many steps; null: when the epochs are done", FROM_ONE
    )
    save_dir: str = by_trainer("folder for checkpoints, metrics.jsonl and rollouts", path=True)
    save_freq: int | None = key(None, "steps between checkpoints; null: only at the end", FROM_ONE)
    save_dtype: Dtype = key(
        Dtype.auto,
        "dtype of the weights in final/ and best/: auto | float32 | bfloat16; auto: actor.dtype "
        "where that is set, else the checkpoint's",
    )
    keep_last: int | None = key(None, "checkpoints to keep; null: all", FROM_ONE)
    async_save: bool = key(
        False,
        "write checkpoints while training goes on; takes memory for a copy of weights and "
        "optimizer",
    )
    trackers: list[str] | None = key(
        None,
        "where metrics go beside metrics.jsonl, a list such as [wandb,tensorboard]; null: wandb, "
        "unless use_wandb is false",
    )
    use_wandb: bool | None = key(
        None,
        "log to wandb as well (offline where there is no key or network); null: as trackers says",
    )
    seed: int = key(0, "seed of data order, sampling and initialisation", SEED)
    max_bad_steps: int = key(5, "non-finite updates in a row that stop the run", FROM_ONE)
    num_threads: int | None = key(
        None,
        "CPU threads of one process; null: those of the checkpoint that the run goes on from, else "
        "its share of the machine's cores (of the rank that has fewest)",
        Range(lambda x: 1 <= x <= 1024, "be 1 to 1024"),
    )
    rank_timeout: float | None = key(
        180,
        "seconds without a sign of life from another rank (its process stopped, its machine or the "
        "network gone) until the run ends; null: never",
        ABOVE_ZERO,
    )
    health: HealthConfig = group(
        HealthConfig,
        "what stops a dying run, with a checkpoint of its last step; null: that rule is off",
    )


@dataclass
class RLTrainerConfig(TrainerConfig):
    test_freq: int | None = key(None, "steps between evaluations; null: no evaluation", FROM_ONE)
    test_sampled: bool = key(
        False,
        "an evaluation also samples the test set by train_sampling_params (test/sampled_score)",
    )
    keep_best: bool = key(True, "keep the model with the best test/score beside the last one")
    dump_rollouts: bool = key(True, "write each step's responses to rollouts/step*.jsonl")
    show_samples: int = key(
        2,
        "answers that each evaluation shows on the terminal, with the end of their prompts; 0: "
        "none",
        FROM_ZERO,
    )
    health: RLHealthConfig = group(
        RLHealthConfig,
        "what stops a dying run, with a checkpoint of its last step; null: that rule is off",
    )
