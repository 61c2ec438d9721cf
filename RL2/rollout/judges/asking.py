"""A judge's access to the engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.engines.protocol import Completion, SamplingParams, check_request
from RL2.rollout.player import Gate, Player
from RL2.rollout.samples import Sample
from RL2.runtime.errors import EngineError, EnvError


@dataclass
class _Request:
    """An open request. written: the tokens so far."""

    written: Completion | None = None


class Asking:
    """The engine, as one call of a judge sees it.

    Args:
        player: sends the requests. gate: limits all requests to `rollout.max_in_flight` at a time.
        sampling: sampling parameters of the step.
        seed: seed of the call. Each request's tokens are mixed into it, so that answers depend
            neither on the order of requests nor on the number of engines.
    """

    def __init__(self, player: Player, gate: Gate, sampling: SamplingParams, seed: tuple[int, ...]):
        self._player, self._gate, self._seed = player, gate, seed
        self._sampling = replace(sampling, stop_token_ids=player.ends.ids)
        self.n_tokens = 0  # written for the judge so far
        self._n_open = 0
        self._between = ExitStack()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self._player.tokenizer

    async def generate(
        self,
        token_ids: list[int],
        *,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        number: int = 0,
    ) -> Completion:
        """A completion of `token_ids` by the policy, with log-probabilities.

        temperature, max_new_tokens: by default as in training (`rollout.train_sampling_params`).
        number: different numbers give different answers to the same tokens.
        """
        changes = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        sampling = replace(
            self._sampling, **{key: value for key, value in changes.items() if value is not None}
        )
        try:
            check_request(token_ids, sampling, self._player.engine.context_length)
        except EngineError as error:  # the judge is at fault, not the engine
            raise EnvError(str(error)) from error
        digest = sha256(array("q", token_ids).tobytes()).digest()[:7]
        seed = (*self._seed, number, int.from_bytes(digest, "big"))
        with self._request():
            completion = await self._player.write(_Request(), token_ids, sampling, seed, self._gate)
        self.n_tokens += len(completion.token_ids)
        return completion

    async def play(self, item: dict[str, Any], *, temperature: float | None = None) -> Sample:
        """One more answer to the prompt `item` (a group's), through the environment to its end as
        in training.

        Raises EnvError if it fails there.
        """
        _, step, _, position, number = self._seed
        sample = Sample(position, number, born=(step, position))
        sampling = self._sampling
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        with self._request():
            await self._player.play(sample, item, sampling, self._gate, train=True)
        self.n_tokens += sample.length
        if sample.error is not None:
            raise EnvError(sample.error)
        return sample

    @contextmanager
    def _request(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        """Count open requests. A judge with none is between two requests: batches wait for it."""
        if not self._n_open:
            self._between.close()
        self._n_open += change
        if not self._n_open:
            self._between.enter_context(self._player.between_requests())

    def __enter__(self) -> Asking:
        self._between.enter_context(self._player.between_requests())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._between.close()
