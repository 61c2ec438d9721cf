"""The engine protocol: token ids in, token ids and their log-probabilities out.

The collector, the environments and the training loop know an engine by this protocol only.
An engine is looked up in `ENGINES`; a factory imports its module when it is called, so that a
machine without one engine's packages runs the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from torch import Tensor

from RL2.config.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is sampled.

    temperature: divides the logits; 0 is greedy decoding.
    max_new_tokens: upper bound of the completion, in tokens, the end-of-sequence token included.
    stop: strings that end a completion; the tokens that spell one stay in `token_ids`.
    no_stop_trim: whether the text that an environment gets keeps the stop string (never
        changes token ids).
    top_p: nucleus of the tempered distribution that is sampled from; 1 is all of it.

    Raises ConfigError for values without a meaning.
    """

    temperature: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    no_stop_trim: bool = True
    top_p: float = 1.0

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

    token_ids: the sampled tokens, the end-of-sequence token included when it was sampled.
    logps: fp32 log-probability of each token under softmax(logits / temperature), before top_p;
        at temperature 0 under the untempered distribution.
    finish_reason: "stop" (end-of-sequence token or stop string), "length" or "abort".
    weight_version: version of the weights that wrote the tokens.
    """

    token_ids: list[int]
    logps: list[float]
    finish_reason: str
    weight_version: int


class Engine(Protocol):
    """An inference engine. Every method raises EngineError, naming what went wrong.

    context_length: most tokens of prompt and completion together; None where there is no limit.
    """

    context_length: int | None

    async def generate(
        self, token_ids: list[int], sampling: SamplingParams, *, seed: int
    ) -> Completion:
        """Complete one prompt. Equal arguments and weights give equal tokens."""
        ...

    async def update_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Replace the weights; completions that start afterwards carry `version`."""
        ...

    async def sleep(self) -> None:
        """Release memory that training can use, where the engine can."""
        ...

    async def wake(self) -> None:
        """Undo `sleep`."""
        ...

    async def close(self) -> None:
        """Free everything. The engine cannot be used afterwards."""
        ...


def _transformers(**options: Any) -> Engine:
    from RL2.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(**options)


ENGINES: dict[str, Callable[..., Engine]] = {"transformers": _transformers}


def build_engine(name: str, **options: Any) -> Engine:
    """Build the engine that `rollout.engine` names; `auto` is the in-process one.

    options: keyword arguments of the engine's constructor.
    Raises ConfigError for a name that is not in `ENGINES`.
    """
    name = getattr(name, "value", name)
    if name == "auto":
        name = "transformers"
    if name not in ENGINES:
        close = get_close_matches(name, ENGINES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"rollout.engine={name}: {hint}use one of auto, {', '.join(ENGINES)}")
    return ENGINES[name](**options)
