"""How many bytes are sent between ranks, to be logged with the seconds."""

from collections.abc import Iterator
from contextlib import contextmanager


class Traffic:
    """Bytes by purpose, as `comm/<name>_bytes`.

    It counts what rank 0 sends to other ranks or receives from them, including padding and
    excluding its own share, so a run of one rank counts 0.
    """

    def __init__(self):
        self._n_bytes: dict[str, int] = {}

    def add(self, name: str, n_bytes: int) -> None:
        self._n_bytes[name] = self._n_bytes.get(name, 0) + n_bytes

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside is counted."""
        before = dict(self._n_bytes)
        try:
            yield
        finally:
            self._n_bytes = before

    def pop(self) -> dict[str, float]:
        """The metrics since the last call."""
        n_bytes, self._n_bytes = self._n_bytes, {}
        return {f"comm/{name}_bytes": float(n) for name, n in n_bytes.items()}
