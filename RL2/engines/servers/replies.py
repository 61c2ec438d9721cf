"""Checks of completions from any kind of server."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from RL2.engines.protocol import Completion, MalformedReply

_FINISH_REASONS = ("stop", "length", "abort")
_ROUNDING = 1e-4  # a log-probability may be above 0 by this much


def completion_of(
    name: str,
    token_ids: Any,
    logps: Iterable[tuple[Any, Any]],
    finish_reason: Any,
    spans: list[dict[str, Any]],
    version: int,
    lowest: float = -math.inf,
) -> Completion:
    """The completion of a reply, from parts that are not checked yet.

    name: name of the kind of server. logps: (token id, log-probability) of each token, the latter
    above `lowest`. spans, version: see `token_versions`.

    Raises MalformedReply for a reply that cannot be trained on.
    """

    def malformed(what: str) -> MalformedReply:
        return MalformedReply(f"{name}: {what}")

    if finish_reason not in _FINISH_REASONS:
        raise malformed(f"finish reason {finish_reason!r}, not one of {', '.join(_FINISH_REASONS)}")
    if not isinstance(token_ids, list) or not all(type(i) is int and i >= 0 for i in token_ids):
        raise malformed(f"no token ids: {token_ids!r:.200}")
    if not token_ids and finish_reason != "abort":
        raise malformed(f"no token, finish reason {finish_reason!r}")
    logps = list(logps)
    if [token for token, _ in logps] != token_ids:
        raise malformed(f"{len(logps)} log-probabilities do not match {len(token_ids)} tokens")
    for position, (_, logp) in enumerate(logps):
        if type(logp) not in (float, int) or not lowest < logp <= _ROUNDING:
            raise malformed(f"log-probability {logp!r} of token {position}")
    return Completion(
        token_ids,
        [min(float(logp), 0.0) for _, logp in logps],
        finish_reason,
        token_versions(name, spans, len(token_ids), version),
    )


def token_versions(name: str, spans: list[dict[str, Any]], count: int, version: int) -> list[int]:
    """The version of the weights of each of `count` tokens, from consecutive spans.

    name: name of the kind of server. spans: {"version", "start", "end"} each, as SGLang and vLLM
    send them; "default", from a server whose version was never set, stands for `version`. A span
    may be empty: SGLang sends one for a request that is aborted before its first token.

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
