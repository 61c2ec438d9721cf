"""`rollout`: the engine that generates, the environment, and how batches are formed."""

from dataclasses import dataclass
from typing import Any

from RL2.config.engines import EMBEDDED, SERVERS
from RL2.config.schema.choices import Device, Dtype, Truncated, WeightSync
from RL2.config.schema.keys import (
    ABOVE_ZERO,
    FROM_ONE,
    FROM_ZERO,
    PROBABILITY,
    Range,
    follow,
    group,
    key,
    required,
)


@dataclass
class RewardModelConfig:
    model_name: str | None = key(
        None,
        "the model of the judge reward_model: a folder, such as the final/ of rm, or hub id of a "
        "sequence classification model with one label",
        path=True,
    )
    device: Device = key(Device.auto, "auto | cpu | cuda; auto: that of the rank")
    batch_size: int = key(16, "samples in one forward", FROM_ONE)
    revision: str | None = key(None, "commit of a hub id, 40 hex digits; null: the newest")
    trust_remote_code: bool = key(
        False, "run Python code that comes with the model; code from the hub needs a revision"
    )
    allow_pickle: bool = key(
        False,
        "load pickled weights (*.bin) where there are no safetensors; loading them can run code",
    )


@dataclass
class SamplingConfig:
    temperature: float = key(
        1.0,
        "divides the logits",
        Range(lambda x: 0 < x <= 100, "be above 0 and at most 100", "; give one such as 1.0"),
    )
    max_new_tokens: int = required(
        "the maximum number of tokens of a response, such as 8192",
        "maximum tokens per turn",
        FROM_ONE,
    )
    stop: Any = key(
        None,
        "text or list of texts that end a turn; in bash a newline is written stop=$'\"\\n\"'",
        takes="text, list of texts or null",
    )
    no_stop_trim: bool = key(
        True,
        "keep the stop text in the response that the environment gets, unless it consists of "
        "special tokens, such as <|im_end|>",
    )
    top_p: float = key(1.0, "sample from the smallest set with this probability", PROBABILITY)


@dataclass
class TestSamplingConfig(SamplingConfig):
    temperature: float = key(
        0.0,
        "divides the logits; 0: greedy",
        Range(lambda x: 0 <= x <= 100, "be 0 (greedy) to 100", "; give one such as 0.0"),
    )
    max_new_tokens: int = follow(
        "rollout.train_sampling_params.max_new_tokens", "maximum tokens per turn", FROM_ONE
    )
    stop: Any = follow(
        "rollout.train_sampling_params.stop", "as in training", takes="text, list of texts or null"
    )
    no_stop_trim: bool = follow("rollout.train_sampling_params.no_stop_trim", "as in training")
    top_p: float = follow("rollout.train_sampling_params.top_p", "as in training", PROBABILITY)


@dataclass
class RolloutConfig:
    model_name: str = follow(
        "actor.model_name", "the engine serves the actor's weights; set it in actor", path=True
    )
    engine: str = key(
        "auto",
        f"engine that generates; auto: on CUDA {', or '.join(SERVERS)}, if installed, else "
        f"{EMBEDDED}; file.py:function or package.module:function for your own",
        code=True,
        own="my_engine.py:make",
    )
    dtype: Dtype = key(
        Dtype.auto,
        "dtype of the engine: auto | float32 | bfloat16; auto: the actor's on CUDA, float32 on CPU",
    )
    tp_size: int = key(1, "tensor-parallel ranks of a server engine", FROM_ONE)
    gpu_memory_utilization: float | None = key(
        None,
        "fraction of the GPU's memory for the engine; null: the engine's default",
        PROBABILITY,
    )
    base_port: int | None = key(
        None,
        "first port of the servers that are started; null: free ones",
        Range(lambda x: 1 <= x <= 65535, "be a port, 1 to 65535"),
    )
    server_url: Any = key(
        None,
        "external servers to use instead of starting some (an address or a list of them); their "
        "key: the environment variable RL2_SERVER_KEY",
        takes="text, list of texts or null",
    )
    server_python: str | None = key(
        None,
        "interpreter of the environment that holds the engine; null: the one that runs the trainer",
        path=True,
    )
    server_args: list[str] = key([], "arguments appended to a server's command line")
    servers_per_node: int | None = key(
        None, "servers to start per machine; null: ranks of the machine / rollout.tp_size", FROM_ONE
    )
    server_start_timeout: float = key(
        600.0, "seconds within which a started server must answer", ABOVE_ZERO
    )
    request_timeout: float = key(
        1800.0, "seconds for one turn of one sample, then the request is sent again", ABOVE_ZERO
    )
    request_retries: int = key(
        3, "how often a request is sent again; a server that died does not count", FROM_ZERO
    )
    max_restarts: int = key(8, "how often one server is restarted in a run", FROM_ZERO)
    weight_sync: WeightSync = key(
        WeightSync.auto,
        "how weights reach the servers: auto | tensor (memory of this machine) | distributed (a "
        "process group) | disk (a folder); auto: tensor for servers that the run starts, "
        "distributed for server_url on another machine",
    )
    weights_dir: str | None = key(
        None,
        "folder for the copy of the weights that servers get; null: shared memory where it fits, "
        "else the temporary directory",
        path=True,
    )
    sleep: bool | None = key(
        None,
        "servers release their memory during updates; null: on CUDA with rollout.staleness=0, for "
        "servers that the run starts",
    )
    max_batch_size: int = key(
        256, "samples that the transformers engine generates at a time", FROM_ONE
    )
    responses_per_prompt: int = follow(
        "train_data.responses_per_prompt", "samples drawn for each prompt; set it in train_data"
    )
    max_turns: int = key(1, "maximum model turns per sample", FROM_ONE)
    env_path: str | None = required(
        "the python file of the environment, such as envs/gsm8k.py, or null to learn from a "
        "teacher without rewards",
        "python file with the environment (envs/gsm8k.py); null: no rewards (every sample gets 0), "
        "for algorithms that read none",
        path=True,
    )
    judges: list[str] = key(
        [],
        "functions that see a prompt's finished samples in training and add fields to them: "
        "agreement, greedy (the reward of the greedy answer, for adv.estimator=remax), "
        "reward_model, or your own (file.py:function or package.module:function)",
        code=True,
        own="my_judge.py:my_judge",
    )
    reward_model: RewardModelConfig = group(RewardModelConfig)
    rewards: dict[str, float] = key(
        {},
        "weights of several rewards that the environment returns as `rewards`, such as "
        "{accuracy: 1.0, format: 0.5}; adv.estimator=gdpo normalises each by itself",
    )
    env_timeout: float = key(
        60.0, "seconds after which a call of the environment counts as failed", ABOVE_ZERO
    )
    env_workers: int | None = key(
        None,
        "environment processes per rank; null: one per CPU core of the rank, at most 8; 0: run the "
        "environment in the trainer's process, for debuggers and objects that cannot be pickled; a "
        "call that blocks or crashes there blocks or ends the run",
        FROM_ZERO,
    )
    max_env_errors: float | None = key(
        0.5,
        "samples of a step that may fail in the environment before the run stops: a share if below "
        "1 (one failure is always allowed), else a number; 0: none; null: never stop",
        FROM_ZERO,
    )
    max_malformed: float | None = key(
        0.1, "the same for samples with an invalid reply from the engine", FROM_ZERO
    )
    max_in_flight: int = key(1024, "samples that one rank's engine works on at a time", FROM_ONE)
    truncated: Truncated = key(
        Truncated.keep,
        "samples with a turn that was cut off at max_new_tokens: keep (the environment's reward) | "
        "mask (left out of the loss, of what it is divided by, and of the prompt's baseline; kept "
        "in metrics and rollouts) | zero (reward 0; the score stays)",
    )
    overlong_buffer: int = key(
        0,
        "DAPO's overlong shaping: the last tokens before max_new_tokens, in which the reward (not "
        "the score) of a turn falls linearly by up to overlong_penalty; 0: none",
        FROM_ZERO,
    )
    overlong_penalty: float = key(
        1.0, "overlong_buffer: what a turn of max_new_tokens tokens loses", ABOVE_ZERO
    )
    dynamic_filtering: bool = key(
        True,
        "leave out prompts whose samples all got the same reward, penalties for length apart",
    )
    max_resampled: int = key(
        0,
        "maximum prompts that a step draws to replace those left out; 0: train on fewer",
        FROM_ZERO,
    )
    partial_rollout: bool = key(
        False,
        "a step ends with the last group it needs; unfinished samples continue in the next step, "
        "with newer weights",
    )
    over_sampling: int | None = key(
        None,
        "partial_rollout: prompts in flight beyond prompts_per_rollout; null: half of that",
        FROM_ONE,
    )
    staleness: int = key(
        0,
        "1: generate the next step while training on this one, with weights that are one step old; "
        "0: exactly on-policy",
        Range(lambda x: x in (0, 1), "be 0 (on-policy) or 1"),
    )
    llm_kl_alarm: float | None = key(
        0.05, "rollout/llm_kl above which the run warns; null: never", ABOVE_ZERO
    )
    train_sampling_params: SamplingConfig = group(SamplingConfig)
    test_sampling_params: TestSamplingConfig = group(TestSamplingConfig)
