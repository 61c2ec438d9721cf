"""`rollout`: the engine that generates, the environment, and how batches come together."""

from dataclasses import dataclass
from typing import Any

from RL2.config.engines import EMBEDDED, SERVERS
from RL2.config.schema.choices import Dtype, Truncated, WeightSync
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
class SamplingConfig:
    temperature: float = key(
        1.0,
        "divides the logits",
        Range(lambda x: 0 < x <= 100, "be above 0 and at most 100", "; give one such as 1.0"),
    )
    max_new_tokens: int = required(
        "the tokens of a response at most, such as 8192", "tokens of one turn at most", FROM_ONE
    )
    stop: Any = key(
        None,
        "text or list of texts that end a turn; in bash a newline is written stop=$'\"\\n\"'",
        takes="text, list of texts or null",
    )
    no_stop_trim: bool = key(
        True,
        "keep the stop text in the response that the environment gets, unless it is made of "
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
        "rollout.train_sampling_params.max_new_tokens", "tokens of one turn at most", FROM_ONE
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
        f"what generates; auto: on CUDA {', or '.join(SERVERS)}, where installed, else {EMBEDDED}; "
        "file.py:function or package.module:function for your own",
        code=True,
        own="my_engine.py:make",
    )
    dtype: Dtype = key(
        Dtype.auto,
        "what the engine computes in: auto | float32 | bfloat16; auto: the actor's on CUDA, "
        "float32 on CPU",
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
        "external servers to use (an address or a list of them), instead of starting some; their "
        "key: RL2_SERVER_KEY in the environment",
        takes="text, list of texts or null",
    )
    server_python: str | None = key(
        None,
        "interpreter of the environment that holds the engine; null: the one that runs the trainer",
        path=True,
    )
    server_args: list[str] = key([], "appended to a server's command line")
    servers_per_node: int | None = key(
        None, "servers to start on each machine; null: its ranks / rollout.tp_size", FROM_ONE
    )
    server_start_timeout: float = key(
        600.0, "seconds until a started server must answer", ABOVE_ZERO
    )
    request_timeout: float = key(
        1800.0, "seconds for one turn of one sample; after that it is sent again", ABOVE_ZERO
    )
    request_retries: int = key(
        3, "times that a request is sent again; a server that died does not count", FROM_ZERO
    )
    max_restarts: int = key(8, "times that one server is started again in a run", FROM_ZERO)
    weight_sync: WeightSync = key(
        WeightSync.auto,
        "how weights reach the servers: auto | tensor (memory of this machine) | distributed (a "
        "process group) | disk (a folder); auto: tensor for our own, distributed for server_url "
        "elsewhere",
    )
    weights_dir: str | None = key(
        None,
        "folder for the copy of the weights that servers get; null: shared memory where it fits, "
        "else the temporary directory",
        path=True,
    )
    sleep: bool | None = key(
        None,
        "servers release their memory during updates; null: on CUDA, for servers of our own with "
        "rollout.staleness=0",
    )
    max_batch_size: int = key(
        256, "samples that the transformers engine generates at a time", FROM_ONE
    )
    responses_per_prompt: int = follow(
        "train_data.responses_per_prompt", "samples drawn for each prompt; set it in train_data"
    )
    max_turns: int = key(1, "model turns in one sample at most", FROM_ONE)
    env_path: str = required(
        "the python file of the environment, such as envs/gsm8k.py",
        "python file with the environment (envs/gsm8k.py)",
        path=True,
    )
    judges: list[str] = key(
        [],
        "what looks at a prompt's finished samples in training and adds fields to them: agreement, "
        "or functions of your own (file.py:function or package.module:function)",
        code=True,
        own="my_judge.py:my_judge",
    )
    env_timeout: float = key(
        60.0, "seconds after which one call of the environment has failed", ABOVE_ZERO
    )
    env_workers: int | None = key(
        None,
        "processes for the environment on each rank; null: its CPU cores, at most 8; 0: run it in "
        "the trainer's own process, for debuggers and what cannot be pickled; a call that blocks "
        "or crashes there blocks or ends the run",
        FROM_ZERO,
    )
    max_env_errors: float | None = key(
        0.5,
        "samples of a step that the environment may fail before the run stops: below 1 their share "
        "(one failure is always allowed), from 1 on their number, 0: none; null: never stop",
        FROM_ZERO,
    )
    max_malformed: float | None = key(
        0.1, "the same for samples to which the engine gave a meaningless reply", FROM_ZERO
    )
    max_in_flight: int = key(1024, "samples that one rank's engine works on at a time", FROM_ONE)
    truncated: Truncated = key(
        Truncated.keep,
        "samples with a turn that was cut off at max_new_tokens: keep (rewarded as the environment "
        "says) | mask (no part in the loss, in what divides it, or in the baseline of their "
        "prompt; they stay in metrics and rollouts) | zero (reward 0; the score stays)",
    )
    dynamic_filtering: bool = key(True, "leave out prompts whose samples all got the same reward")
    max_resampled: int = key(
        0,
        "prompts that one step draws at most to replace those left out; 0: train on fewer",
        FROM_ZERO,
    )
    partial_rollout: bool = key(
        False,
        "a step ends with the last group it needs; unfinished samples go on in the next one, by "
        "then with newer weights",
    )
    over_sampling: int | None = key(
        None,
        "partial_rollout: prompts in flight beyond prompts_per_rollout; null: half of it",
        FROM_ONE,
    )
    staleness: int = key(
        0,
        "1: generate the next step while training on this one, so with weights one step old; 0: "
        "exactly on-policy",
        Range(lambda x: x in (0, 1), "be 0 (on-policy) or 1"),
    )
    llm_kl_alarm: float | None = key(
        0.05, "rollout/llm_kl above which the run warns; null: never", ABOVE_ZERO
    )
    train_sampling_params: SamplingConfig = group(SamplingConfig)
    test_sampling_params: TestSamplingConfig = group(TestSamplingConfig)
