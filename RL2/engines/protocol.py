"""The engine protocol: token ids in, token ids and their log-probabilities out.

The collector and the training loop use engines through this protocol only. Engines by name:
`RL2.engines.registry`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from RL2.runtime.errors import ConfigError, EngineError


class MalformedReply(EngineError):
    """An engine's reply that no model can have written: wrong counts, NaN, not JSON, or empty.

    Neither the weights nor the prompt are to blame, so the sample is dropped and the run goes on.
    """


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is sampled.

    temperature: divides the logits; 0 is greedy decoding.
    max_new_tokens: most tokens of a completion, including the end-of-sequence token.
    stop: strings that end a completion; the tokens that spell one stay in `token_ids`.
    no_stop_trim: whether the text that an environment gets keeps the stop string (never
        changes token ids).
    top_p: share of the tempered distribution that is sampled from (nucleus sampling); 1 is all.
    stop_token_ids: more tokens that end a completion, besides the end tokens that the engine finds.

    Raises ConfigError for invalid values.
    """

    temperature: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    no_stop_trim: bool = True
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be 1 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError(f"stop={self.stop!r}: must be a tuple of non-empty strings")

    @classmethod
    def from_config(cls, node: Any) -> SamplingParams:
        """Read a `train_sampling_params` or `test_sampling_params` node.

        `stop` may be null, one string or a list of strings.
        """
        stop = node.get("stop")
        stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(
            temperature=float(node.temperature),
            max_new_tokens=int(node.max_new_tokens),
            stop=stop,
            no_stop_trim=bool(node.get("no_stop_trim", True)),
            top_p=float(node.get("top_p", 1.0)),
        )


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after a prompt.

    token_ids: the sampled tokens, including the end-of-sequence token if it was sampled.
    logps: fp32 log-probability of each token under softmax(logits / temperature), before top_p;
        at temperature 0 under the untempered distribution.
    finish_reason: "stop" (end-of-sequence token or stop string), "length", or "abort" (the tokens
        that were written before the abort, possibly none).
    weight_versions: for each token, the version of the weights that wrote it.
    """

    token_ids: list[int]
    logps: list[float]
    finish_reason: str
    weight_versions: list[int]


def check_request(
    token_ids: list[int], sampling: SamplingParams, context_length: int | None
) -> None:
    """Raises EngineError for a prompt without tokens, and for one that is too long."""
    if not token_ids:
        raise EngineError("generate: the prompt has no tokens")
    needed = len(token_ids) + sampling.max_new_tokens
    if context_length is not None and needed > context_length:
        raise EngineError(
            f"max_new_tokens={sampling.max_new_tokens}: with a prompt of {len(token_ids)} tokens "
            f"exceeds the engine's context of {context_length}; shorten the prompt or lower "
            "max_new_tokens"
        )


class Engine(Protocol):
    """An inference engine. Every method raises EngineError, naming what went wrong.

    A class that derives from this one can leave out methods that would do nothing.

    context_length: most tokens of prompt and completion together, known after `start`; None for no
        limit.
    weight_version: version of the current weights.
    """

    context_length: int | None = None
    weight_version: int = 0

    async def start(self, settled: asyncio.Event | None = None) -> None:
        """Get ready to generate. Called once, on the event loop that all other calls come from.

        settled: set while no sample is between two requests. An engine that batches can wait for
            it, so that its batches do not depend on the speed of an environment.
        """
        ...

    @abstractmethod
    async def generate(
        self, token_ids: list[int], sampling: SamplingParams, *, seed: int
    ) -> Completion:
        """Complete one prompt. Equal arguments and weights give equal tokens.

        Raises MalformedReply if the engine's answer makes no sense, after the engine's own retries.
        """
        ...

    @abstractmethod
    async def update_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Replace the weights; tokens that are written afterwards carry `version`.

        Requests may be open between `pause` and `resume`; they go on with the new weights.
        """
        ...

    async def abort(self) -> None:
        """End every open request soon, with the tokens so far and finish reason "abort"."""
        ...

    async def pause(self) -> None:
        """Once this returns, no token is written until `resume`; open requests stay open."""
        ...

    async def resume(self) -> None:
        """Undo `pause`."""
        ...

    async def sleep(self) -> None:
        """Release memory for training, if the engine can."""
        ...

    async def wake(self) -> None:
        """Undo `sleep`. Does nothing when awake."""
        ...

    async def healthy(self) -> bool:
        """Whether a request would be answered now."""
        return True

    def metrics(self) -> dict[str, float]:
        """Metrics of the engine over the run, named `rollout/…`."""
        return {}

    async def close(self) -> None:
        """Free everything. The engine cannot be used afterwards."""
        ...
