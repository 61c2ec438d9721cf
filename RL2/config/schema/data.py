"""`train_data`, `test_data`, and `data` of sft, dpo and rm."""

from dataclasses import dataclass

from RL2.config.schema.choices import Overlong
from RL2.config.schema.keys import FROM_ONE, Range, follow, key, required

_PATH = (
    "split@name:config on the hub (train@openai/gsm8k:main), a json, jsonl, csv, tsv, parquet or "
    "arrow file (text files also as .gz), a folder of files or a pattern, or split@ before one of "
    "these"
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
        "the number of prompts per training step, such as 128",
        "prompts per training step, over all ranks",
        FROM_ONE,
    )
    responses_per_prompt: int = key(1, "samples drawn for each prompt", FROM_ONE)
    max_prompt_length: int | None = key(
        None,
        "maximum tokens of a prompt; null: what max_new_tokens leaves of "
        "actor.max_length_per_device",
        FROM_ONE,
    )
    overlong: Overlong = key(
        Overlong.error, "what to do with longer prompts: error | drop (leave out and count them)"
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
        None, "evaluate on only this many rows, the first ones; null: on all", FROM_ONE
    )


@dataclass
class SFTDataConfig:
    """Prompts with the responses to learn."""

    path: str = required("a data set (train@openai/gsm8k:main) or a file", _PATH, path=True)
    max_length: int = required(
        "the maximum number of tokens of prompt + response, such as 2048",
        "maximum tokens of prompt + response",
        FROM_ONE,
    )
    batch_size: int = key(
        128,
        "sequences per optimizer step, over all ranks; the last step of an epoch takes the rest",
        FROM_ONE,
    )
    overlong: Overlong = key(
        Overlong.error,
        "what to do with sequences longer than max_length: error | drop (leave out and count them)",
    )
    separator: str = key(
        "",
        'text between prompt and response of {"prompt", "response"} rows, learned with the '
        'response; "": nothing between them',
    )
    test_ratio: float = key(
        0.0,
        "share of the rows, chosen by trainer.seed, that are evaluated and not trained on; 0: none",
        Range(lambda x: 0 <= x < 1, "be 0 or more and below 1"),
    )
    test_path: str | None = key(
        None, "rows to evaluate instead, as path; null: those of test_ratio", path=True
    )


@dataclass
class PairDataConfig(SFTDataConfig):
    """Pairs of a chosen and a rejected answer."""

    max_length: int = required(
        "the maximum number of tokens of prompt + answer, such as 2048",
        "maximum tokens of prompt + answer, the longer one of a pair",
        FROM_ONE,
    )
    batch_size: int = key(
        64,
        "pairs (rows, for answers with a label) per optimizer step, over all ranks; the last step "
        "of an epoch takes the rest",
        FROM_ONE,
    )
    overlong: Overlong = key(
        Overlong.error,
        "what to do with pairs longer than max_length: error | drop (leave out and count them)",
    )
    separator: str = key(
        "",
        'text between prompt and answer of {"prompt", "chosen", "rejected"} rows, learned with the '
        'answer; "": nothing between them',
    )
