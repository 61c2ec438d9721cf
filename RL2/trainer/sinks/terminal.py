"""The line of a step on the terminal."""

import time

_SUMMARY = (
    "test/score", "test/loss", "test/accuracy", "train/score", "actor/loss", "actor/entropy",
    "train/avg_response_length", "actor/grad_norm", "actor/skipped", "actor/nonfinite",
    "timing/step",
)  # fmt: skip
_ONLY_IF_NOT_ZERO = ("actor/skipped", "actor/nonfinite")


class Clock:
    """How long a run has taken since it was started or resumed, and how long it will take.

    step: the last step done before.
    """

    def __init__(self, step: int):
        self.start = time.monotonic()
        self._from = step, self.start

    def tick(self, step: int, n_steps: int) -> str:
        """The times in the line of a step. The time left is estimated from the steps since the
        start, without the evaluation before them."""
        now = time.monotonic()
        said = f"elapsed {hours(now - self.start)}"
        first, since = self._from
        if step <= first:
            self._from = step, now
        elif step < n_steps:
            said += f"  left {hours((now - since) / (step - first) * (n_steps - step))}"
        return said


def hours(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def summary(metrics: dict[str, float]) -> str:
    """The metrics that are shown for each step."""
    return "  ".join(
        f"{name} {metrics[name]:.4g}"
        for name in _SUMMARY
        if name in metrics and (metrics[name] or name not in _ONLY_IF_NOT_ZERO)
    )
