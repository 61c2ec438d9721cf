"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

from itertools import islice
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.datasets.base import Sequence, keep_within, load_limited_rows, option
from RL2.datasets.end_of_turn import EndTokens, end_tokens
from RL2.datasets.formats import SFT_ROWS, Unread, format_of
from RL2.datasets.messages import messages_of, tools_of
from RL2.datasets.prompts import SFT_FORMATS, missing_keys, question_prompt, text_of
from RL2.datasets.tokenizing import end_ids_of, tokenize_answers, tokenize_conversations
from RL2.datasets.turns import Answer, Conversation, Turns


class SFTDataset(Dataset):
    """Token sequences with a mask of what is learned; all are read and checked in the constructor.

    Rows are {"prompt", "response"}, {"question", "answer"} (the prompt text of RL, the whole answer
    as response) or {"messages"} (every assistant turn is learned; the token ids are those of the
    chat template's own rendering). If that shows an assistant turn in another way when turns follow
    it, such as without its thoughts, a row becomes several sequences, in which each turn stands as
    the policy writes it and behind what the policy sees.

    What is learned ends as a rollout does, with an end token: the one with which the chat template
    closes the turn, or the marker of the next role if that is an end token (GLM). If a text has
    neither, `eos_token` is added: after the response of the first two kinds of rows, unless it
    already ends with an end token, and after an assistant turn that the template leaves open.

    With {"messages"}, `tools` is passed to the chat template, and a turn with `weight` 0 is not
    learned. `separator` is put between prompt and response of {"prompt", "response"}. It is
    learned, as the prompt of a rollout does not include it.

    end_ids: the tokens that end what is learned.

    An item is a Sequence {"token_ids": list[int], "action_mask": list[bool]}, or a list of several.

    Args:
        config: node `data`: path, max_length (tokens, null for no limit), overlong, max_examples,
            separator.
        ends: end tokens of the model; None: those of the tokenizer alone.

    Raises:
        DataError: unreadable data, a malformed row (file and line), an overlong sequence.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        key: str = "data",
        ends: EndTokens | None = None,
    ) -> None:
        ends = ends or end_tokens(tokenizer)
        self.key = key
        self.batch_size_key = f"{key}.batch_size"
        rows = load_limited_rows(config, key)
        parse = _Parser(tokenizer, ends, key, option(config, "separator", ""))
        parsed = rows.parsed(parse, key)
        parse.unread.report()
        found = _tokenized(parsed, tokenizer, ends, key)
        for i, sequences in enumerate(found):
            if not all(any(sequence["action_mask"][1:]) for sequence in sequences):
                problem = "no token to learn (the first token of a row cannot be learned)"
                raise rows.error(i, key, problem)
        lengths = [max(len(sequence["token_ids"]) for sequence in row) for row in found]
        kept = keep_within(lengths, config, rows, key, "sequences")
        self.end_ids = end_ids_of((sequence for i in kept for sequence in found[i]), ends)
        self._items = [found[i] if len(found[i]) > 1 else found[i][0] for i in kept]
        self.fingerprint = rows.fingerprint(kept)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sequence | list[Sequence]:
        return self._items[index]


class _Parser:
    """Turns a row into a prompt and a response, or into conversations."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: EndTokens, key: str, separator: str
    ):
        self.tokenizer, self.separator = tokenizer, separator
        self.turns, self.unread = Turns(tokenizer, ends, key), Unread(key, tokenizer)

    def __call__(self, row: dict[str, Any]) -> Answer | list[Conversation]:
        kind = format_of(row, SFT_ROWS)
        if kind is None:
            raise missing_keys(row, SFT_FORMATS)
        self.unread.add_row(row, kind)
        if "messages" in kind.needs:
            messages, tools = messages_of(row), tools_of(row)
            self.unread.add_messages(messages, tools)
            return self.turns.conversations(messages, tools)
        if "prompt" in kind.needs:
            prompt, response = (text_of(row, name) for name in kind.needs)
            return Answer(prompt, self.separator + response, self.turns.last())
        question, answer = text_of(row, "question"), text_of(row, "answer")
        prompt = question_prompt(self.tokenizer, question)
        # If there is a chat template, it gives both the prompt and the end.
        last, turn = self.turns.last(), self.turns.ends.turn
        return Answer(prompt, answer, last if turn is None else turn)


def _tokenized(
    parsed: list[Answer | list[Conversation]],
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
    key: str,
) -> list[list[Sequence]]:
    """The sequences of each row, in the order of the rows."""
    answers = [one for one in parsed if isinstance(one, Answer)]
    talks = [talk for one in parsed if not isinstance(one, Answer) for talk in one]
    of_answers = iter(tokenize_answers(answers, tokenizer, ends))
    of_talks = iter(tokenize_conversations(talks, tokenizer, key))
    return [
        [next(of_answers)] if isinstance(one, Answer) else [*islice(of_talks, len(one))]
        for one in parsed
    ]
