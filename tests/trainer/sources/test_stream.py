"""A position in the data that is exact wherever it stands."""

from RL2.trainer.sources.stream import PromptStream


class Loader:
    """Batches of rows, in an order, with a state: what a stream asks of a loader."""

    def __init__(self, n, size):
        self.n, self.size, self.at, self.epoch = n, size, 0, 0

    def __iter__(self):
        while self.at + self.size <= self.n:
            start, self.at = self.at, self.at + self.size
            yield [{"index": (self.epoch, i)} for i in range(start, start + self.size)]
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.at, self.epoch = state["at"], state["epoch"]


def test_a_stream_resumes_wherever_it_stands():
    def index(items):
        return [item["index"] for item in items]

    dataset = {(e, i): {"index": (e, i)} for e in range(9) for i in range(12)}
    expected = index(PromptStream(dataset, Loader(12, 4)).draw(100))
    assert len(set(expected)) == 100
    for n in range(1, 30):
        stream = PromptStream(dataset, Loader(12, 4))
        first = index(stream.draw(n))
        unfinished = [dataset[i] for i in first[:2]]
        again = PromptStream(dataset, Loader(12, 4))
        again.load_state_dict(stream.state_dict(), unfinished)
        assert (
            first + index(again.draw(20 + len(unfinished)))[len(unfinished) :]
            == (expected[: n + 20])
        )
        again.load_state_dict(stream.state_dict(), unfinished)
        assert index(again.draw(1)) == first[:1]
        # What was not drawn yet is in the next state as well.
        third = PromptStream(dataset, Loader(12, 4))
        third.load_state_dict(again.state_dict())
        assert index(third.draw(21)) == (first[1:2] + expected[n:])[:21]
