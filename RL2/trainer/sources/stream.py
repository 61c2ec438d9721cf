"""One stream of the items of a data set, with an exact position."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader


class PromptStream:
    """The items of a loader as one stream, epoch after epoch, from which any number is drawn.

    Its state is exact at every item: the loader's state before the current batch, and how many
    items of that batch are used.
    """

    def __init__(self, dataset: Dataset, loader: StatefulDataLoader):
        self.dataset, self.loader = dataset, loader
        self._first: list[Any] = []  # items to draw before all others
        self._batches: Iterator[list[Any]] | None = None
        self._batch: list[Any] = []
        self._before: dict[str, Any] = {}  # the loader's state before `_batch`
        self._used = 0  # items of `_batch`

    def draw(self, n: int) -> list[Any]:
        """The next n items."""
        drawn, self._first = self._first[:n], self._first[n:]
        while len(drawn) < n:
            self._need_batch()
            more = self._batch[self._used :][: n - len(drawn)]
            self._used += len(more)
            drawn += more
        return drawn

    def draw_batch(self) -> list[Any]:
        """The rest of the current batch of the loader, or the next one; the last of an epoch may be
        smaller."""
        self._need_batch()
        return self.draw(len(self._batch) - self._used)

    def _need_batch(self) -> None:
        if self._used == len(self._batch):
            self._before = self.loader.state_dict()
            self._batch, self._used = self._next_batch(), 0

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""
        within = self._used < len(self._batch)
        return {
            "loader": self._before if within else self.loader.state_dict(),
            "used": self._used if within else 0,
            "first": [item["index"] for item in self._first],
        }

    def load_state_dict(self, state: dict[str, Any], again: Iterable[Any] = ()) -> None:
        """Continue where `state_dict` was called.

        again: items to draw before all others.
        """
        self.loader.load_state_dict(state["loader"])
        self._first, self._batches, self._batch, self._used = [], None, [], 0
        self.draw(state["used"])
        self._first = [*again, *(self.dataset[index] for index in state["first"])]

    def _next_batch(self) -> list[Any]:
        while True:
            if self._batches is None:
                self._batches = iter(self.loader)
            for batch in self._batches:
                return batch
            self._batches = None
