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
        "steps in a row that must break a rule before it stops the run, unless the rule has a "
        "number of its own",
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
        "actor/entropy, in nats, below which the policy has collapsed; null by default, as what "
        "counts as low depends on the task, and sft may memorise its data",
        ABOVE_ZERO,
    )
    max_entropy: float | None = key(
        None,
        "actor/entropy above which the policy writes noise; null by default, as an untrained "
        "model starts there, at the logarithm of its vocabulary size",
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
        "actor/p_max above which the policy is sure of every token; a policy that has fully solved "
        "its task stays below",
        PROBABILITY,
    )
    min_length_ratio: float | None = key(
        0.02,
        "train/avg_response_length, as a fraction of its mean over the first `patience` steps, "
        "below which responses have collapsed; never triggers where they were short from the start",
        PROBABILITY,
    )
    max_llm_kl: float | None = key(
        0.5,
        "rollout/llm_kl above which engine and trainer are two policies, ten times the default of "
        "rollout.llm_kl_alarm",
        ABOVE_ZERO,
    )
    check_versions: bool | None = key(
        True,
        "stop at once if tokens do not come from the weights that the engine got last "
        "(rollout.staleness=1: or the ones before; rollout.partial_rollout: or any older ones)",
    )


@dataclass
class TrainerConfig:
    source: str = by_trainer(
        "where batches come from; may be your own class (file.py:Class or package.module:Class)",
        code=True,
        own="my_source.py:MySource",
    )
    project: str = key("RL2", "project in wandb and other trackers")
    experiment_name: str = key("default", "name of the run in trackers and of its folder")
    load_ckpt_from: str | None = key(
        None, "what to resume from: null (start anew) | latest | a checkpoint folder", path=True
    )
    n_epochs: int = key(1, "passes over the training data", FROM_ONE)
    max_steps: int | None = key(
        None, "stop after this many steps; null: when the epochs are done", FROM_ONE
    )
    test_freq: int | None = key(None, "steps between evaluations; null: no evaluation", FROM_ONE)
    keep_best: bool = key(
        True,
        "keep the model of the best evaluation, in addition to the last one: the highest "
        "test/score, or without rollouts the lowest test/loss",
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
        "write checkpoints while training continues; needs memory for a copy of weights and "
        "optimizer",
    )
    trackers: list[str] | None = key(
        None,
        "where metrics go besides metrics.jsonl, a list such as [wandb,tensorboard]; null: wandb, "
        "unless use_wandb is false",
    )
    use_wandb: bool | None = key(
        None,
        "also log to wandb (offline without a key or network); null: as trackers says",
    )
    seed: int = key(0, "seed of data order, sampling and initialisation", SEED)
    max_bad_steps: int = key(5, "non-finite updates in a row that stop the run", FROM_ONE)
    num_threads: int | None = key(
        None,
        "CPU threads per process; null: as in the checkpoint that the run resumes from, else the "
        "process's share of the machine's cores (the smallest share of all ranks)",
        Range(lambda x: 1 <= x <= 1024, "be 1 to 1024"),
    )
    rank_timeout: float | None = key(
        180,
        "seconds without a sign of life from another rank (its process has stopped, its machine or "
        "the network is lost) until the run ends; null: never",
        ABOVE_ZERO,
    )
    health: HealthConfig = group(
        HealthConfig,
        "rules that stop a failing run, with a checkpoint of its last step; null: that rule is off",
    )


@dataclass
class RLTrainerConfig(TrainerConfig):
    test_sampled: bool = key(
        False,
        "evaluations also sample the test set with train_sampling_params (test/sampled_score)",
    )
    dump_rollouts: bool = key(True, "write each step's responses to rollouts/step*.jsonl")
    show_samples: int = key(
        2,
        "answers that each evaluation prints, with the end of their prompts; 0: none",
        FROM_ZERO,
    )
    health: RLHealthConfig = group(
        RLHealthConfig,
        "rules that stop a failing run, with a checkpoint of its last step; null: that rule is off",
    )
