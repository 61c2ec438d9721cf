"""Checks by checksums whether a server holds the weights that were published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

Part = tuple[tuple[str, ...], int, int]
"""Published names of a part of a parameter (several if it is fused and cannot be split), number of
elements, `weights.checksum`."""


def first_difference(
    held: Iterable[Part], checksums: Mapping[str, int], sizes: Mapping[str, int]
) -> str | None:
    """Compare what a server holds with what was published.

    Checksums are sums: those of shards add up to that of the whole parameter, and a parameter that
    n ranks hold has n times the elements and n times the checksum. Padding is zeros.

    held: the parts of all its ranks. checksums, sizes: checksum and number of elements by published
    name.

    Returns None, or a line that names the first parameter that differs.
    """
    totals: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for names, count, checksum in held:
        totals[names][0] += count
        totals[names][1] += checksum
    covered: set[str] = set()
    for names, (count, checksum) in totals.items():
        label = " + ".join(names)
        names = _as_published(names, checksums)
        unknown = [name for name in names if name not in checksums]
        if unknown:
            return f"{unknown[0]} is in the server and was not published"
        size = sum(sizes[name] for name in names)
        copies = count // size
        if not copies:
            return f"{label} has {count} elements in the server, and {size} were published"
        if (checksum - copies * sum(checksums[name] for name in names)) % 2**64:
            return f"{label} differs"
        covered.update(names)
    missing = [name for name in checksums if name not in covered]
    return f"{missing[0]} was published and is not in the server" if missing else None


def _as_published(names: tuple[str, ...], published: Mapping[str, int]) -> tuple[str, ...]:
    """The published names of a part: a head that is tied to the embedding has that name only."""
    if len(names) == 1 and names[0].endswith("lm_head.weight") and names[0] not in published:
        embeddings = [name for name in published if name.endswith("embed_tokens.weight")]
        if len(embeddings) == 1:
            return tuple(embeddings)
    return names
