"""A mistake in a source file, and the test that has to notice it."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Mutation:
    """
    Attributes:
        path: of the source file.
        old: text that occurs in it once; new: what stands there instead.
        test: that has to turn red.
    """

    path: str
    old: str
    new: str
    test: str


def mutations_of(path: str, test: str, changes: dict[str, tuple[str, str]]) -> dict[str, Mutation]:
    """Of one file, `{name: (old, new)}`; the names begin with that of the file."""
    stem = Path(path).stem
    return {f"{stem}-{name}": Mutation(path, *one, test) for name, one in changes.items()}


def apply(mutation: Mutation, source: str) -> str:
    """The mutated source.

    Raises:
        ValueError: the text to replace does not occur exactly once.
    """
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.path}: {source.count(mutation.old)} times {mutation.old!r}")
    return source.replace(mutation.old, mutation.new)
