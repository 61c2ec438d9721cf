"""How many bytes cross between ranks, to be logged beside the seconds."""


class Traffic:
    """Bytes by what they were for, as `comm/<name>_bytes`.

    It counts what rank 0 sends to others or receives from them, padding included and its own share
    excluded, so a run of one rank counts 0.
    """

    def __init__(self):
        self._n_bytes: dict[str, int] = {}

    def add(self, name: str, n_bytes: int) -> None:
        self._n_bytes[name] = self._n_bytes.get(name, 0) + n_bytes

    def pop(self) -> dict[str, float]:
        """The metrics since the last call."""
        n_bytes, self._n_bytes = self._n_bytes, {}
        return {f"comm/{name}_bytes": float(n) for name, n in n_bytes.items()}
