"""What is asked of a completion that a server sends, whatever kind of server it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from RL2.engines.protocol import Completion, MalformedReply

_FINISH_REASONS = ("stop", "length", "abort")
_ROUNDING = 1e-4  # a log-probability may be above 0 by so much


def completion_of(
    name: str,
    token_ids: Any,
    told: Iterable[tuple[Any, Any]],
    finish_reason: Any,
    spans: list[dict[str, Any]],
    version: int,
    lowest: float = -math.inf,
) -> Completion:
    """The completion of a reply, whose parts may still be anything.

    name: of the kind of server. told: a token id and a log-probability for each token, the latter
    above `lowest`. spans, version: see `token_versions`.

    Raises MalformedReply for what cannot be trained on.
    """

    def odd(what: str) -> MalformedReply:
        return MalformedReply(f"{name}: {what}")

    if finish_reason not in _FINISH_REASONS:
        raise odd(f"finish reason {finish_reason!r}, not one of {', '.join(_FINISH_REASONS)}")
    if not isinstance(token_ids, list) or not all(type(i) is int and i >= 0 for i in token_ids):
        raise odd(f"no token ids: {token_ids!r:.200}")
    if not token_ids and finish_reason != "abort":
        raise odd(f"no token, finish reason {finish_reason!r}")
    told = list(told)
    if [token for token, _ in told] != token_ids:
        raise odd(f"{len(told)} log-probabilities that are not of the {len(token_ids)} tokens")
    for position, (_, logp) in enumerate(told):
        if type(logp) not in (float, int) or not lowest < logp <= _ROUNDING:
            raise odd(f"log-probability {logp!r} of token {position}")
    return Completion(
        token_ids,
        [min(float(logp), 0.0) for _, logp in told],
        finish_reason,
        token_versions(name, spans, len(token_ids), version),
    )


def token_versions(name: str, spans: list[dict[str, Any]], count: int, version: int) -> list[int]:
    """Version of the weights of each of `count` tokens, from spans that follow one another.

    name: of the kind of server. spans: {"version", "start", "end"} each, as SGLang and vLLM tell
    them; the version "default" of a server that was never told one stands for `version`. A span
    may be empty: SGLang sends one with a request that is aborted before its first token.

    Raises MalformedReply for spans that leave a gap, overlap, or cover another number of tokens.
    """
    versions: list[int] = []
    try:
        for span in spans:
            start, end = span["start"], span["end"]
            if start != len(versions) or not start <= end <= count:
                raise ValueError("no span of these tokens")
            number = version if span["version"] == "default" else int(span["version"])
            versions += [number] * (end - start)
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedReply(f"{name}: weight versions {spans!r:.200}, {count} tokens") from error
    if len(versions) != count:
        raise MalformedReply(f"{name}: weight versions {spans!r:.200}, {count} tokens")
    return versions
