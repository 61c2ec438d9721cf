"""Samples that the policy wrote, and groups of them.

The token ids that an engine sampled are trained on unchanged; text is decoded from them only for
the environment.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.algorithms.rewards import are_equal, total
from RL2.datasets.end_of_turn import EndTokens
from RL2.engines.protocol import Completion, SamplingParams

_MASK_64 = (1 << 64) - 1
NOT_THE_POLICY = -1  # weight version of a token that the policy did not write


def stable_seed(*parts: int) -> int:
    """Mix integers into one of 63 bits; the same on every machine and in every process.

    A chain of splitmix64 steps, so that neighboring samples get unrelated seeds.
    """
    state = 0
    for part in parts:
        state = ((state ^ (part & _MASK_64)) + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state >> 1


def action_parts(
    completion: Completion,
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
) -> tuple[str, str]:
    """The text of a completion for the environment, and the stop text that was cut off after it.

    The token that ended the completion is in neither; all other special tokens stay (`</think>` may
    be one). A stop text is cut off with `no_stop_trim=False`, and always if it consists of special
    tokens, which only mark the end of a turn.
    """
    ids = completion.token_ids
    whole = _decode(tokenizer, ids)
    if completion.finish_reason != "stop":
        return whole, ""
    last = ids[-1] if ids else None
    # An external server may know more end tokens than we do; these count as well.
    by_token = last in ends.ids or (
        last in ends.special and not any(stop in whole for stop in sampling.stop)
    )
    text = _decode(tokenizer, ids[:-1]) if by_token else whole
    cut = [
        stop
        for stop in sampling.stop
        if stop in whole and (not sampling.no_stop_trim or _is_special(stop, tokenizer, ends))
    ]
    at = min([len(text), *map(whole.find, cut)])
    return text[:at], text[at:]


def without_echo(text: str, hidden: str, stops: tuple[str, ...]) -> str:
    """What an environment wrote after an action, without a leading copy of the stop text that was
    cut off (`hidden`)."""
    for echo in (hidden, *(stop for stop in stops if hidden.startswith(stop))):
        if text.startswith(echo):
            return text[len(echo) :]
    return text


def _is_special(stop: str, tokenizer: PreTrainedTokenizerBase, ends: EndTokens) -> bool:
    ids = tokenizer.encode(stop.strip(), add_special_tokens=False)
    return bool(ids) and ends.special.issuperset(ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode tokens that follow others: at the beginning of a text, sentencepiece decoders would
    drop the space of the first token."""

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before = tokenizer.encode("0", add_special_tokens=False)[-1:]
    head, whole = text_of(before), text_of(before + ids)
    return whole[len(head) :] if whole.startswith(head) else text_of(ids)


@dataclass
class Turn:
    """One action and the environment's judgment."""

    state: str
    action: str
    length: int
    finish_reason: str
    reward: float
    score: float


@dataclass
class Sample:
    """One answer to one prompt, over all its turns.

    position: place of the prompt in the step. response: number of the answer to that prompt.
    sequences: token sequences as for `RL2.datasets.base.collate`; more than one if a turn's state
        does not continue the turn before.
    error: why the sample failed and is dropped; None for a good one.
    cause: cause of the error: "env" (the environment failed), "malformed" (the engine's reply made
        no sense) or "abort" (the engine gave up).
    index: of the prompt in the data set.
    born: the step in which the sample began and its place there, which give its seed; None:
        `position` is the place.
    state, extra_info: start of the next turn; None before the first one. extra_info is bytes if the
        environment runs in a separate process.
    written: the completion of the next turn, until the environment has answered it.
    ended: whether the sample is finished.
    masked: whether it is left out of the batch, because it was cut off.
    fields: values from judges: a number, or one for each token that the policy wrote.
    judge_tokens: tokens that the engine wrote for judges, counted at one of the group's samples.
    parts: the sums of several rewards by name (`rollout.rewards`).
    penalty: for its length (`RL2.rollout.overlong`); a part of the reward, 0 or less.
    """

    position: int
    response: int
    turns: list[Turn] = field(default_factory=list)
    sequences: list[dict[str, list]] = field(default_factory=list)
    prompt: str | None = None
    answer: Any = None
    error: str | None = None
    cause: str | None = None
    born: tuple[int, int] | None = None
    state: str | None = None
    extra_info: dict[str, Any] | bytes | None = None
    written: Completion | None = None
    ended: bool = False
    masked: bool = False
    fields: dict[str, float | list[float]] = field(default_factory=dict)
    judge_tokens: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    penalty: float = 0.0
    index: int = 0

    @property
    def truncated(self) -> bool:
        """Whether a turn was cut off at the token limit."""
        return any(turn.finish_reason == "length" for turn in self.turns)

    @property
    def earned(self) -> float:
        """The reward without the penalty."""
        return total(turn.reward for turn in self.turns)

    @property
    def reward(self) -> float:
        return total([*(turn.reward for turn in self.turns), self.penalty])

    @property
    def score(self) -> float:
        return math.fsum(turn.score for turn in self.turns)

    @property
    def length(self) -> int:
        return sum(turn.length for turn in self.turns)

    def zero_rewards(self) -> None:
        """Make the reward 0; the score stays."""
        self.penalty = 0.0
        for turn in self.turns:
            turn.reward = 0.0
        for sequence in self.sequences:
            sequence["rewards"] = [0.0] * len(sequence["rewards"])

    def set_reward(self, reward: float) -> None:
        """Set the sample's reward, on the last action; the score stays."""
        self.zero_rewards()
        self.turns[-1].reward = reward
        self._add_to_last_action(reward)

    def set_penalty(self, penalty: float) -> None:
        """Set the penalty, on the last action."""
        if penalty != self.penalty:
            self._add_to_last_action(penalty - self.penalty)
            self.penalty = penalty

    def _add_to_last_action(self, reward: float) -> None:
        acted = [one for one in self.sequences if any(one["action_mask"])]
        add_reward(acted[-1], reward)

    def fail(self, error: str, cause: str) -> None:
        self.error, self.cause = error, cause

    def state_dict(self) -> dict[str, Any]:
        """A copy in plain values, from which the sample can continue. If `extra_info` has other
        values, the sample starts again."""
        if not self.ended and not _is_plain(self.extra_info):
            return {"response": self.response, "born": self.born}
        state = {item.name: getattr(self, item.name) for item in fields(self)}
        del state["position"]  # given by its group
        state["turns"] = [asdict(turn) for turn in self.turns]
        state["sequences"] = [
            {name: list(values) for name, values in sequence.items()} for sequence in self.sequences
        ]
        state["extra_info"] = None if self.ended else deepcopy(self.extra_info)
        state["fields"], state["parts"] = dict(self.fields), dict(self.parts)
        state["answer"] = self.answer if _is_plain(self.answer) else str(self.answer)
        state["written"] = asdict(self.written) if self.written else None
        return state

    @classmethod
    def from_state_dict(cls, position: int, state: dict[str, Any]) -> Sample:
        """The sample of a `state_dict`, at a new position."""
        sample = cls(position, **state)
        sample.turns = [Turn(**turn) for turn in sample.turns]
        sample.written = Completion(**sample.written) if sample.written else None
        return sample


@dataclass(eq=False)  # compared by identity
class Group:
    """All answers to one prompt.

    position: place of the prompt in the step; changed by `renumber` in a later step.
    item: the prompt, as the data set gives it. unfinished: number of samples that are being played.
    judged: whether the run's judges, if any, are done with it.
    """

    position: int
    item: dict[str, Any]
    samples: list[Sample]
    unfinished: int = 0
    judged: bool = False

    @classmethod
    def begin(cls, position: int, item: dict[str, Any], n_responses: int, step: int) -> Group:
        """A new group, without answers."""
        samples = [
            Sample(position, response, born=(step, position), index=item.get("index", 0))
            for response in range(n_responses)
        ]
        return cls(position, item, samples)

    def state_dict(self) -> dict[str, Any]:
        """The group in plain values, with the prompt's index in the data set."""
        samples = [sample.state_dict() for sample in self.samples]
        return {"index": self.item["index"], "samples": samples, "judged": self.judged}

    @classmethod
    def from_state_dict(cls, position: int, item: dict[str, Any], state: dict[str, Any]) -> Group:
        """The group of a `state_dict`, at a new position; `item` is its prompt."""
        samples = [Sample.from_state_dict(position, sample) for sample in state["samples"]]
        for sample in samples:
            sample.index = item.get("index", 0)
        return cls(position, item, samples, judged=state.get("judged", False))

    def renumber(self, position: int) -> None:
        self.position = position
        for sample in self.samples:
            sample.position = position

    def teaches(self, filtering: bool) -> bool:
        """Whether a finished group goes into a batch: some sample is good and not masked and, with
        `filtering`, the rewards differ."""
        good = [sample for sample in self.samples if sample.error is None and not sample.masked]
        rewards = [sample.earned for sample in good]
        return bool(rewards) and not (filtering and are_equal(rewards))


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint, which is loaded without pickle, can hold the value."""
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool, bytes)


def start_sequence(token_ids: list[int]) -> dict[str, list]:
    """A sequence with only the tokens that the policy was given."""
    names = ("token_ids", "action_mask", "llm_logps", "rewards", "weight_versions")
    sequence: dict[str, list] = {name: [] for name in names}
    extend(sequence, token_ids)
    return sequence


def extend(
    sequence: dict[str, list], token_ids: list[int], completion: Completion | None = None
) -> None:
    """Append tokens of a completion or of the environment."""
    n = len(token_ids)
    wrote = completion is not None
    sequence["token_ids"] += token_ids
    sequence["action_mask"] += [wrote] * n
    sequence["llm_logps"] += completion.logps if wrote else [0.0] * n
    sequence["weight_versions"] += completion.weight_versions if wrote else [NOT_THE_POLICY] * n
    sequence["rewards"] += [0.0] * n


def add_reward(sequence: dict[str, list], reward: float) -> None:
    """Put a turn's reward on the last action token; for an empty action, on the one before.

    A sequence without action tokens gets no reward, as there is nothing to learn.
    """
    for index in range(len(sequence["action_mask"]) - 1, -1, -1):
        if sequence["action_mask"][index]:
            sequence["rewards"][index] += reward
            return


def staleness(batch: dict[str, Tensor], version: int) -> float:
    """How many versions the weights that wrote a token are behind `version`: the mean over the
    action tokens, 0 if there are none."""
    written = batch["weight_versions"][batch["action_mask"]]
    return (version - written.double()).mean().item() if len(written) else 0.0
