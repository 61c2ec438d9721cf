"""`train_data`, `test_data`, and `data` of sft."""

from dataclasses import dataclass

from RL2.config.schema.choices import Overlong
from RL2.config.schema.keys import FROM_ONE, follow, key, required

_PATH = (
    "split@name:config of the hub (train@openai/gsm8k:main), a json, jsonl, csv, tsv, parquet or "
    "arrow file (text ones also .gz), a folder or pattern of them, or split@ and one of these"
)


@dataclass
class PromptDataConfig:
    """The prompts that are trained on."""

    path: str | None = required(
        "a data set (train@openai/gsm8k:main), a file, or null for an environment that writes its "
        "own prompts",
        f"{_PATH}; null: the environment writes the prompts",
        path=True,
    )
    prompts_per_rollout: int = required(
        "the number of prompts of a training step, such as 128",
        "prompts of one training step, over all ranks",
        FROM_ONE,
    )
    responses_per_prompt: int = key(1, "samples drawn for each prompt", FROM_ONE)
    max_prompt_length: int | None = key(
        None, "tokens; null: what max_new_tokens leaves of actor.max_length_per_device", FROM_ONE
    )
    overlong: Overlong = key(
        Overlong.error, "prompts that are longer: error | drop (leave them out and count them)"
    )


@dataclass
class TestDataConfig(PromptDataConfig):
    """The prompts that the policy is evaluated on."""

    path: str | None = key(None, "as train_data.path; null: no evaluation", path=True)
    prompts_per_rollout: int = follow(
        "train_data.prompts_per_rollout",
        "no effect here: every prompt is evaluated, in batches of rollout.max_batch_size",
        FROM_ONE,
    )
    responses_per_prompt: int = key(1, "samples for each prompt; the score is the mean", FROM_ONE)
    max_prompt_length: int | None = follow("train_data.max_prompt_length", within=FROM_ONE)
    overlong: Overlong = follow("train_data.overlong")
    max_examples: int | None = key(
        None, "evaluate on the first rows only, as many as this says; null: on all", FROM_ONE
    )


@dataclass
class SFTDataConfig:
    """Prompts with the responses to learn."""

    path: str = required("a data set (train@openai/gsm8k:main) or a file", _PATH, path=True)
    max_length: int = required(
        "the tokens of prompt + response at most, such as 2048",
        "tokens of prompt + response at most",
        FROM_ONE,
    )
    batch_size: int = key(
        128,
        "sequences of one optimizer step, over all ranks; the last step of an epoch takes what is "
        "left",
        FROM_ONE,
    )
    overlong: Overlong = key(
        Overlong.error,
        "sequences longer than max_length: error | drop (leave them out and count them)",
    )
    separator: str = key(
        "",
        'text between prompt and response of {"prompt", "response"} rows, learned with the '
        'response; "": none, so that they are joined as they stand',
    )
