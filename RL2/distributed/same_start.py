"""Check that the ranks of a run were started with the same things.

Each rank publishes what it was started with. Ranks that would train a mixture of two runs, or wait
for each other forever, end with one line that names the difference.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

_LONGEST = 200  # characters of a value in a message
_MOST_NAMES = 4


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on all ranks.

    value: the value as shown in messages.
    way_out: what to do if it differs.
    digest: a digest of the value itself, if that is not what is shown.
    """

    value: str
    way_out: str
    digest: str = ""

    @property
    def identity(self) -> str:
        return self.digest or self.value


Facts = Mapping[str, Fact]
"""Facts by the name that a user knows: a config key, a package, a variable."""


def packed(facts: Facts) -> str:
    """The facts as text, to send them to other ranks."""
    return json.dumps({key: [fact.value, fact.way_out, fact.digest] for key, fact in facts.items()})


def unpacked(text: str) -> dict[str, Fact]:
    """The inverse of `packed`."""
    return {key: Fact(*fields) for key, fields in json.loads(text).items()}


def fingerprint(text: str) -> str:
    """A short SHA-256."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def difference(all_facts: Sequence[Facts], hosts: Sequence[str]) -> str | None:
    """What differs on the first rank that is not like rank 0, in one line; None if nothing does.

    hosts: the names of the ranks' machines.
    """
    first = all_facts[0]
    differing = [_differing(first, other) for other in all_facts]
    rank = next((rank for rank, keys in enumerate(differing) if keys), None)
    if rank is None:
        return None
    (key, *more), other = differing[rank], all_facts[rank]
    own, theirs = first.get(key), other.get(key)
    has = [_shown(own), _shown(theirs)]
    if has[0] == has[1]:
        has[1] = "a different one"
    names = ", ".join(more[:_MOST_NAMES]) + ", ..." * (len(more) > _MOST_NAMES)
    others = f" (and {names})" if more else ""
    return (
        f"{key}: rank 0 on {hosts[0]} has {has[0]}, rank {rank} on {hosts[rank]} has {has[1]}"
        f"{others}; {(own or theirs).way_out}"
    )


def _differing(first: Facts, other: Facts) -> list[str]:
    one, two = ({key: fact.identity for key, fact in facts.items()} for facts in (first, other))
    return [key for key in one | two if one.get(key) != two.get(key)]


def _shown(fact: Fact | None) -> str:
    text = "none" if fact is None else fact.value
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
