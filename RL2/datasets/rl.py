"""Prompts for rollouts."""

from __future__ import annotations

import copy
import logging
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets.base import keep_within, load_limited_rows, option
from RL2.datasets.context import Context
from RL2.datasets.extra_info import fault_of
from RL2.datasets.formats import RL_ROWS, Unread, format_of
from RL2.datasets.messages import messages_of, tools_of
from RL2.datasets.prompts import (
    RL_FORMATS,
    extra_info_of,
    gold_answer,
    missing_keys,
    prompt_text,
    question_asked,
    text_of,
)
from RL2.datasets.rows import BadRow, Rows
from RL2.runtime.errors import DataError

logger = logging.getLogger(__name__)


class RLDataset(Dataset):
    """Tokenised prompts, and the extra_info that the environment gets with each.

    All rows are read, checked and tokenised in the constructor, so that a bad row stops the run
    before a model is loaded. Prompts are tokenised without special tokens, except those that the
    chat template writes, such as BOS.

    An item is {"prompt": str, "prompt_ids": list[int], "extra_info": dict, "index": int}. With
    `path: null` (an environment that makes its own prompts in `reset`) it is {"extra_info": {},
    "index": int}, and there are `prompts_per_rollout` of them.

    Args:
        config: node `train_data` or `test_data`: path, prompts_per_rollout, overlong, max_examples,
            max_prompt_length.
        key: name of that node, for messages.
        max_prompt_length: maximum tokens; None: `config.max_prompt_length`, where null is no limit.
        max_extra_info: maximum bytes of a row's extra_info, pickled; None for no limit.
        context: makes the prompt that a teacher reads, whose tokens are kept in `contexts`.
        max_context_length: maximum tokens of that.

    Attributes:
        contexts: the tokens of the teacher's prompts; None without `context`.

    Raises:
        DataError: unreadable data, a malformed row (file and line), an overlong prompt.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        key: str = "train_data",
        max_prompt_length: int | None = None,
        max_extra_info: int | None = None,
        context: Context | None = None,
        max_context_length: int | None = None,
    ) -> None:
        self.key = key
        self.batch_size_key = f"{key}.prompts_per_rollout"
        self.contexts: list[list[int]] | None = None
        if option(config, "path") is None:
            self._items: list[dict[str, Any]] = [
                {"extra_info": {}} for _ in range(config.prompts_per_rollout)
            ]
            self.fingerprint = ""
            return
        rows = load_limited_rows(config, key)
        unread = Unread(key, tokenizer)
        items = rows.parsed(lambda row: _item(row, tokenizer, unread, max_extra_info, context), key)
        unread.report()
        _warn_of_missing_answers(items, rows, key)
        prompts = [item["prompt"] for item in items]
        prompt_ids = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        for i, ids in enumerate(prompt_ids):
            if not ids:
                raise rows.error(i, key, "the tokenizer gives no token for the prompt")
            items[i]["prompt_ids"] = ids
        lengths, name = [len(ids) for ids in prompt_ids], "max_prompt_length"
        kept = keep_within(lengths, config, rows, key, "prompts", name, max_prompt_length)
        self._items = [items[i] for i in kept]
        if context is not None:
            texts = [items[i].pop("context") for i in kept]
            self.contexts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            _check_contexts(self.contexts, max_context_length, rows, kept)
        self.fingerprint = rows.fingerprint(kept)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # A copy: environments may write into extra_info, and the next epoch must not see that.
        item = self._items[index]
        return {**item, "extra_info": copy.deepcopy(item["extra_info"]), "index": index}


def _warn_of_missing_answers(items: list[dict[str, Any]], rows: Rows, key: str) -> None:
    """If only some rows have an answer, that may be intended, or an error in the data."""
    without = [i for i, item in enumerate(items) if "answer" not in item["extra_info"]]
    if 0 < len(without) < len(items):
        logger.warning(
            "%s.path: %d of %d rows have no answer, the first at %s; an environment that compares "
            "with one fails there", key, len(without), len(items), rows.where(without[0]),
        )  # fmt: skip


def _item(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    unread: Unread,
    max_extra_info: int | None,
    context: Context | None = None,
) -> dict[str, Any]:
    """Prompt text and extra_info of one row, and with `context` the teacher's prompt text."""
    kind = format_of(row, RL_ROWS)
    if kind is None:
        raise missing_keys(row, RL_FORMATS)
    unread.add_row(row, kind)
    tools = None
    if "messages" in kind.needs:
        asked, tools = messages_of(row), tools_of(row)
        unread.add_messages(asked, tools)
        prompt = prompt_text(tokenizer, asked, tools)
        extra_info = extra_info_of(row)
    elif "prompt" in kind.needs:
        prompt = asked = text_of(row, "prompt")
        extra_info = extra_info_of(row)
    else:
        question = text_of(row, "question")
        gold = gold_answer(text_of(row, "answer"))
        asked = question_asked(tokenizer, question)
        prompt = prompt_text(tokenizer, asked)
        extra_info = {**extra_info_of(row), "answer": gold}
    if (fault := fault_of(extra_info, max_extra_info)) is not None:
        raise BadRow(fault)
    item = {"prompt": prompt, "extra_info": extra_info}
    if context is None:
        return item
    made = context(copy.deepcopy(asked), copy.deepcopy(extra_info))
    return item | {"context": prompt_text(tokenizer, made, tools)}


def _check_contexts(
    contexts: list[list[int]], limit: int | None, rows: Rows, kept: list[int]
) -> None:
    """DataError if the teacher's prompt of a row is empty, or longer than `limit`."""
    for ids, row in zip(contexts, kept, strict=True):
        if not ids or (limit is not None and len(ids) > limit):
            raise DataError(
                f"teacher.context: {rows.where(row)}: its prompt has {len(ids)} tokens, and must "
                f"have 1 to {limit}; raise teacher.max_inference_length_per_device (with "
                "teacher.model_name=policy that of actor), or make it shorter"
            )
