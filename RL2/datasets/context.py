"""Responses after another prompt: what a teacher with a longer context reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from RL2.datasets.base import collate
from RL2.datasets.rows import BadRow

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""

Context = Callable[[Prompt, dict[str, Any]], Prompt]
"""From a row's prompt and extra_info to the prompt, of the same kind, that the teacher gets."""


def by_template(template: str) -> Context:
    """The prompt with a text in the place of the last message's content, or of the whole text.

    template: `{prompt}` is what it takes the place of, other names are those of extra_info.
    """

    def fill(text: str, extra_info: dict[str, Any]) -> str:
        try:
            return template.format(**extra_info | {"prompt": text})
        except (LookupError, ValueError, AttributeError) as error:
            known = ", ".join(["prompt", *sorted(map(str, extra_info))])
            raise BadRow(
                f"teacher.context={template}: cannot be filled ({type(error).__name__}: {error}); "
                f"the row has {known}"
            ) from error

    def context(prompt: Prompt, extra_info: dict[str, Any]) -> Prompt:
        if isinstance(prompt, str):
            return fill(prompt, extra_info)
        *before, last = prompt
        return [*before, last | {"content": fill(last["content"], extra_info)}]

    return context


def after_prompts(batch: dict[str, Tensor], prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The responses of a batch of single turns, row by row after these prompts (token ids): states,
    actions, action_mask and lengths. Its actions are the same, in the same order; rows without
    any stay as they are."""
    sequences = []
    for row, prompt in enumerate(prompts):
        length = int(batch["lengths"][row])
        mask = batch["action_mask"][row, :length].tolist()
        ids = [*batch["states"][row, :1].tolist(), *batch["actions"][row, :length].tolist()]
        if any(mask):
            first = mask.index(True)
            ids = [*prompt, *batch["actions"][row, first:length].tolist()]
            mask = [False] * (len(prompt) - 1) + mask[first:]
        sequences.append({"token_ids": ids, "action_mask": [False, *mask]})
    return collate(sequences)
