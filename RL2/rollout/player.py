"""Plays one sample from prompt to end: the engine writes, the environment answers."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.datasets.continuation import continuation_encoder
from RL2.datasets.end_of_turn import EndTokens, end_tokens
from RL2.engines.protocol import Completion, Engine, MalformedReply, SamplingParams
from RL2.environments.calls import LARGEST, TOO_LARGE
from RL2.environments.environment import Environment, Step
from RL2.rollout.overlong import Overlong
from RL2.rollout.samples import (
    Sample,
    Turn,
    action_parts,
    add_reward,
    extend,
    stable_seed,
    start_sequence,
    without_echo,
)
from RL2.runtime.errors import EngineError, EnvError, RL2Error, raised

_LONG_TEXT = 2**16  # characters
_HIGHEST_LOGP = 1.0  # 0, plus more than the rounding errors of engines in 16 bits


class Gate:
    """Lets requests pass to an engine: at most `limit` at a time, and none while closed."""

    def __init__(self, limit: int):
        self._slots = asyncio.Semaphore(limit)
        self._opened = asyncio.Event()
        self._opened.set()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Wait until the gate is open and has a free slot; the body is one request."""
        while True:
            await self._opened.wait()
            async with self._slots:
                if not self.is_open:
                    continue  # it closed while we waited for a slot
                self._inside += 1
                self._empty.clear()
                try:
                    yield
                finally:
                    self._inside -= 1
                    if not self._inside:
                        self._empty.set()
                return

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        """Let no more requests in."""
        self._opened.clear()

    async def drain(self, engine: Engine) -> None:
        """Close the gate, abort all requests inside, and wait until they have ended."""
        self.close()
        if self._inside:
            await engine.abort()  # also ends requests that reach a server late
        await self._empty.wait()


class Player:
    """Plays samples.

    Args:
        engine: writes the answers. environment: judges them.
        tokenizer: the policy's tokenizer. seed: the run's seed.
        max_turns: most model turns in one sample.
        max_length: most tokens in one sequence; a sample whose next turn might not fit ends.
        ends: end tokens of the policy; None takes those of the tokenizer.
        truncated: what happens to samples with a turn that was cut off at the token limit: "keep",
            "mask" (left out of the batch) or "zero" (their reward is 0).
        overlong: the penalty for long answers in training.
        rewards: weights of an environment's several rewards, by name; empty if it has one.
        settled: set while no sample is between two requests, i.e. uses its environment or its
            tokenizer.
    """

    def __init__(
        self,
        engine: Engine,
        environment: Environment,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        max_turns: int,
        max_length: int | None,
        ends: EndTokens | None = None,
        truncated: str = "keep",
        overlong: Overlong | None = None,
        rewards: Mapping[str, float] = MappingProxyType({}),
        settled: asyncio.Event | None = None,
    ):
        self.engine = engine
        self.environment = environment
        self.tokenizer = tokenizer
        self.seed = seed
        self.max_turns = max_turns
        self.max_length = max_length
        continuations = continuation_encoder(tokenizer)
        self._encode_continuation = lambda text: continuations([text])[0]
        self.ends = ends or end_tokens(tokenizer)
        self.truncated = truncated
        self.overlong = overlong or Overlong()
        self.rewards = dict(rewards)
        self._settled = settled or asyncio.Event()
        self._settled.set()
        self._n_between = 0

    async def play(
        self,
        sample: Sample,
        item: dict[str, Any],
        sampling: SamplingParams,
        gate: Gate,
        *,
        train: bool,
    ) -> None:
        """Play a sample from its current state to its end. A failure of its environment, or a
        malformed reply, ends only this sample."""
        sampling = replace(sampling, stop_token_ids=self.ends.ids)
        try:
            await self._play(sample, item, sampling, gate, train)
        except EnvError as error:
            sample.fail(str(error), "env")
        except MalformedReply as error:
            sample.fail(str(error), "malformed")
        sample.ended = True
        self.shape(sample, sampling if train else None)
        sample.masked = sample.truncated and self.truncated == "mask"

    async def _play(
        self,
        sample: Sample,
        item: dict[str, Any],
        sampling: SamplingParams,
        gate: Gate,
        train: bool,
    ) -> None:
        # At each await the sample holds all that is needed to continue it in another process.
        step, position = sample.born
        # All calls of a sample go to one process of the environment.
        key = stable_seed(step, int(train), position, sample.response)
        if sample.state is None:
            with self.between_requests():
                await self._begin(sample, item, key)
        for turn in range(len(sample.turns), self.max_turns):
            sequence = sample.sequences[-1]
            seed = (self.seed, step, int(train), position, sample.response, turn)
            completion = await self.write(sample, sequence["token_ids"], sampling, seed, gate)
            if completion.finish_reason == "abort":
                sample.fail("the engine aborted the completion", "abort")
                return
            with self.between_requests():
                state = sample.state
                action, hidden = action_parts(completion, sampling, self.tokenizer, self.ends)
                prefix = state + action
                try:
                    result = await self.environment.step(
                        state, action, sample.extra_info, key, completion.finish_reason
                    )
                    reward = self._reward_of(result)
                    ends = result.done or turn + 1 == self.max_turns
                    continues = not ends and result.next_state.startswith(prefix)
                    text = "" if ends else result.next_state
                    if continues:  # the state gets the stop text, as the tokens have it
                        added = without_echo(text[len(prefix) :], hidden, sampling.stop)
                        text = prefix + hidden + added
                    new = await self._encode(added if continues else text, continues)
                    if not (ends or continues or new):  # engines cannot answer an empty prompt
                        raise EnvError(
                            f"{self.environment.path}: step returned next_state={text!r:.80}, "
                            "which has no tokens, and done=False; return text to go on with, or "
                            "done=True"
                        )
                finally:  # so that a failed sample shows what was judged
                    extend(sequence, completion.token_ids, completion)
                    sample.written = None
                add_reward(sequence, reward)
                for name in self.rewards:
                    sample.parts[name] = sample.parts.get(name, 0.0) + result.rewards[name]
                sample.turns.append(
                    Turn(
                        state,
                        action,
                        len(completion.token_ids),
                        completion.finish_reason,
                        reward,
                        result.score,
                    )  # fmt: skip
                )
                self._check_sums(sample)
                if ends:
                    return
                if continues and new and completion.finish_reason == "stop":
                    # A chat template closes the action with the end token that the policy wrote.
                    last = completion.token_ids[-1:]
                    if new[:1] == last and last[0] in self.ends.special.union(self.ends.ids):
                        new = new[1:]
                begun = len(sequence["token_ids"]) if continues else 0
                if (
                    self.max_length is not None
                    and begun + len(new) + sampling.max_new_tokens > self.max_length
                ):
                    return
                if continues:
                    extend(sequence, new)
                else:
                    sample.sequences.append(start_sequence(new))
                sample.state, sample.extra_info = text, result.extra_info

    async def _begin(self, sample: Sample, item: dict[str, Any], key: int) -> None:
        extra_info = deepcopy(dict(item.get("extra_info") or {}))
        sample.answer = extra_info.get("answer")
        state, ids = item.get("prompt"), item.get("prompt_ids")
        if state is None:
            state, extra_info = await self.environment.reset(extra_info, key)
            ids = None
        ids = await self._encode(state) if ids is None else list(ids)
        sample.prompt = sample.state = state
        sample.extra_info = extra_info
        sample.sequences.append(start_sequence(ids))

    def shape(self, sample: Sample, sampling: SamplingParams | None) -> None:
        """With `rollout.truncated=zero`, set the reward of a sample that was cut off to 0; give it
        its penalty for length. May be called again when a judge has set the reward.

        sampling: that of training; None in an evaluation, where no answer is too long.
        """
        if sample.truncated and self.truncated == "zero":
            sample.zero_rewards()
            sample.parts = dict.fromkeys(sample.parts, 0.0)
        if sampling is not None and sample.error is None:
            limit = sampling.max_new_tokens
            sample.set_penalty(
                sum(self.overlong.of_turn(one.length, limit) for one in sample.turns)
            )

    def _reward_of(self, result: Step) -> float:
        """The reward of a step: its own, or the weighted sum of its several ones.

        Raises EnvError if these are not those of `rollout.rewards`.
        """
        if (given := {*(result.rewards or {})}) != {*self.rewards}:
            raise EnvError(
                f"{self.environment.path}: step returned the rewards {sorted(given)}, and "
                f"rollout.rewards names {sorted(self.rewards)}; give each its weight there"
            )
        if result.reward is not None:
            return result.reward
        return math.fsum(weight * result.rewards[name] for name, weight in self.rewards.items())

    def _check_sums(self, sample: Sample) -> None:
        """Raise EnvError if the sum over turns is not finite in float32."""
        for name, sum_ in (("reward", sample.reward), ("score", sample.score)):
            if abs(sum_) > LARGEST:
                raise EnvError(
                    f"{self.environment.path}: step: the {name}s of {len(sample.turns)} turns add "
                    f"up to {sum_:g}, which is {TOO_LARGE}"
                )

    @contextmanager
    def between_requests(self) -> Iterator[None]:
        self._n_between += 1
        self._settled.clear()
        try:
            yield
        finally:
            self._n_between -= 1
            if not self._n_between:
                self._settled.set()

    async def write(
        self,
        holder: Any,
        prompt: list[int],
        sampling: SamplingParams,
        seed: tuple[int, ...],
        gate: Gate,
    ) -> Completion:
        """One complete completion, such as an action of a sample. What is written so far is kept in
        `holder.written`. If a closing gate interrupts it, it continues when the gate opens.

        A continuation has another seed: noise is a function of seed and place in the response, so
        the same seed would repeat the noise of the beginning.
        """
        holder.written = written = holder.written or Completion([], [], "abort", [])
        while written.finish_reason == "abort":
            n = len(written.token_ids)
            if n >= sampling.max_new_tokens:
                return replace(written, finish_reason="length")
            async with gate.passing():
                part = await self._generate(
                    prompt + written.token_ids,
                    replace(sampling, max_new_tokens=sampling.max_new_tokens - n),
                    stable_seed(*seed, n) if n else stable_seed(*seed),
                )
            check(part)
            written = join(written, part)
            if n:
                written = end_at_stop(written, n, sampling.stop, self.tokenizer)
            holder.written = written
            if gate.is_open:
                break  # an abort that was not requested here
        return written

    async def _generate(self, token_ids: list[int], sampling: SamplingParams, seed: int):
        try:
            return await self.engine.generate(token_ids, sampling, seed=seed)
        except RL2Error:
            raise
        except Exception as error:  # of an engine of the user's own
            kind = type(self.engine)
            what = raised(error, inspect.getfile(kind))
            raise EngineError(f"{kind.__name__}.generate {what}") from error

    async def _encode(self, text: str, continues: bool = False) -> list[int]:
        """The tokens of a text at the beginning of a sequence, or (`continues`) after another."""
        encode = partial(self.tokenizer.encode, text, add_special_tokens=False)
        if continues:
            encode = partial(self._encode_continuation, text)
        # A very long text would block the event loop.
        return encode() if len(text) < _LONG_TEXT else await asyncio.to_thread(encode)


def check(completion: Completion) -> None:
    """Raise MalformedReply for a completion that no model can have written."""
    n = len(completion.token_ids)
    if n != len(completion.logps) or n != len(completion.weight_versions):
        raise MalformedReply(
            f"the engine returned {n} tokens, {len(completion.logps)} log-probabilities and "
            f"{len(completion.weight_versions)} weight versions"
        )
    if not all(map(math.isfinite, completion.logps)):
        raise MalformedReply("the engine returned a log-probability that is not finite")
    lowest, highest = min(completion.logps, default=0), max(completion.logps, default=0)
    if lowest < -LARGEST or highest > _HIGHEST_LOGP:
        wrong = highest if highest > _HIGHEST_LOGP else lowest
        raise MalformedReply(f"the engine returned the log-probability {wrong:g}")
    if completion.finish_reason not in ("stop", "length", "abort"):
        raise MalformedReply(
            f"the engine returned the finish reason {completion.finish_reason!r}, which is not "
            "stop, length or abort"
        )
    if not n and completion.finish_reason != "abort":
        raise MalformedReply(
            f"the engine returned no token and the finish reason {completion.finish_reason!r}"
        )


def join(first: Completion, then: Completion) -> Completion:
    """Join a completion and its continuation."""
    return Completion(
        first.token_ids + then.token_ids,
        first.logps + then.logps,
        then.finish_reason,
        first.weight_versions + then.weight_versions,
    )


def end_at_stop(
    completion: Completion,
    n_before: int,
    stop: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
) -> Completion:
    """End a completion that was joined from parts at its first stop string.

    An engine searches for stop strings only in what it writes itself, so it misses one that begins
    in the first `n_before` tokens and ends after them.
    """

    def stops(n_tokens: int) -> bool:
        text = tokenizer.decode(
            completion.token_ids[:n_tokens],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return any(one in text for one in stop)

    n_tokens = len(completion.token_ids)
    if not stop or not stops(n_tokens):
        return completion
    first = next(n for n in range(n_before + 1, n_tokens + 1) if stops(n))
    return Completion(
        completion.token_ids[:first],
        completion.logps[:first],
        "stop",
        completion.weight_versions[:first],
    )
