"""Row formats: what a row must have, and the prompt text that is made from it.

A row is one of

    {"messages": [{"role", "content"}, ...], "tools": [...], "extra_info": {...}}
    {"prompt": "...", "extra_info": {...}}
    {"question": "...", "answer": "... #### 42"}                       (GSM8K)

`extra_info` is optional and goes to the environment unchanged; an `answer` column next to
`messages` or `prompt` becomes `extra_info["answer"]`. `messages`, `tools` and `extra_info` may be
JSON strings, because a CSV cell can hold nothing else.
"""

from __future__ import annotations

import json
import math
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.datasets.rows import BadRow, type_name
from RL2.runtime.errors import one_line

GSM8K_INSTRUCTION = "Let's think step by step and end with `#### answer`."
RL_FORMATS = '{"messages", "extra_info"}, {"prompt", "extra_info"} or {"question", "answer"}'
SFT_FORMATS = '{"messages"}, {"prompt", "response"} or {"question", "answer"}'


def text_of(row: dict[str, Any], name: str) -> str:
    """`row[name]`, checked by `require_text`."""
    return require_text(row[name], name)


def require_text(value: Any, name: str) -> str:
    """The string itself; BadRow for null, NaN, another type, or blank or not encodable text."""
    if not isinstance(value, str):
        advice = "it must be a non-empty string"
        if name in ("prompt", "question", "response") and isinstance(value, list):
            advice += '; a conversation [{"role", "content"}, ...] belongs under messages'
        raise BadRow(f"{name} is {type_name(value)}; {advice}")
    if not value or value.isspace():
        raise BadRow(f"{name} is empty; fill it or remove the row")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                f"{name} contains half a surrogate pair (character {error.start}); "
                "write the character itself or remove it",
            ) from error
    return value


def missing_keys(row: dict[str, Any], formats: str) -> BadRow:
    """The error for a row that fits none of `formats`, with the keys that it has."""
    lacking = "question"
    if "question" in row:
        lacking = "answer"
    elif "prompt" in row:
        lacking = "response"
    found = ", ".join(sorted(map(str, row))) or "none"
    return BadRow(f"row without {lacking}: it has the keys {found}; a row is {formats}")


def extra_info_of(row: dict[str, Any]) -> dict[str, Any]:
    """`row["extra_info"]` (absent or null: empty) with the `answer` column, if any, in it."""
    value = row.get("extra_info")
    if isinstance(value, str):
        value = from_json(value, "extra_info") if value.strip() else None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise BadRow(
            f'extra_info is {type_name(value)}; it must be an object such as {{"answer": "42"}}',
        )
    if "answer" in row and "answer" not in value:
        value = {**value, "answer": row["answer"]}
    if "answer" in value:
        _require_answer(value["answer"])
    return value


def _require_answer(answer: Any) -> None:
    """Raise BadRow unless a response can be compared with it, including the items of a list."""
    if isinstance(answer, (list, dict)) and answer:
        for item in answer.values() if isinstance(answer, dict) else answer:
            _require_answer(item)
        return
    found = None
    if answer is None or isinstance(answer, float) and not math.isfinite(answer):
        found = type_name(answer)
    elif answer in ([], {}):
        found = "empty"
    elif isinstance(answer, str):
        # numpy and data frames write NaN for a missing number.
        found = "NaN" if answer.strip().lower() == "nan" else None
        require_text(answer, "answer")
    if found is not None:
        raise BadRow(f"answer is {found}; fill it or remove the row")


def gold_answer(answer: str) -> str:
    """The text after the last `####` of a GSM8K answer."""
    _, mark, gold = answer.rpartition("####")
    gold = gold.strip()
    if not mark or not gold:
        problem = "answer has nothing after its last '####'" if mark else "answer without '####'"
        raise BadRow(
            f"{problem}; a GSM8K answer ends with '#### 42' (rows of another kind: "
            '{"prompt": "...", "extra_info": {"answer": "42"}})',
        )
    _require_answer(gold)
    return gold


def question_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Prompt text of a GSM8K question: from the chat template, or plain if there is none."""
    return prompt_text(tokenizer, question_asked(tokenizer, question))


def question_asked(tokenizer: PreTrainedTokenizerBase, question: str) -> str | list[dict[str, Any]]:
    """A GSM8K question as the message of a user, or plain if there is no chat template."""
    if tokenizer.chat_template is None:
        return f"{question}\n{GSM8K_INSTRUCTION}\n"
    return [{"role": "user", "content": f"{question} {GSM8K_INSTRUCTION}"}]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    asked: str | list[dict[str, Any]],
    tools: list[Any] | None = None,
) -> str:
    """Prompt text of a text, which is that itself, or of messages."""
    return asked if isinstance(asked, str) else messages_prompt(tokenizer, asked, tools)


def messages_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
) -> str:
    """Prompt text of a conversation that the policy continues.

    Without a chat template: the content of a single user message, and a newline.
    """
    if messages[-1]["role"] == "assistant":
        raise BadRow(
            "messages end with an assistant turn; a prompt ends before it "
            "(move the reference answer into extra_info)",
        )
    if tokenizer.chat_template is None and len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"] + "\n"
    return render(tokenizer, messages, add_generation_prompt=True, tools=tools)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: list[Any] | None = None,
) -> str:
    """The chat template's text of `messages`; BadRow if the template rejects them."""
    if tokenizer.chat_template is None:
        raise BadRow(
            "messages need a tokenizer with a chat template and this one has none; "
            'use an instruction-tuned model, or {"prompt": "..."} rows',
        )
    # A weight is for the trainer, not for the model.
    shown = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            shown, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        text.encode()  # half a surrogate pair, which no tokenizer takes
        return text
    except Exception as error:  # a template is a program: it may divide by zero
        raise BadRow(f"the chat template rejects the messages: {one_line(error)}") from error


def from_json(value: Any, name: str) -> Any:
    """The value of a JSON text; a value that is not a text is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(
            f"{name} is a string that is not JSON ({one_line(error)}); write it as JSON"
        ) from error
