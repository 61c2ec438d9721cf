"""The metrics of optimizer steps."""

import math
from collections.abc import Iterable


def merged(steps: Iterable[dict[str, float]], name: str) -> dict[str, float]:
    """Mean over the optimizer steps that have a metric; counts are summed. name: the learner's."""
    values: dict[str, list[float]] = {}
    for metrics in steps:
        for key, value in metrics.items():
            values.setdefault(key, []).append(value)
    counts = [f"{name}/{count}" for count in ("skipped", "nonfinite", "ratio_skipped")]
    return {
        key: sum(numbers) if key in counts else sum(numbers) / len(numbers)
        for key, numbers in values.items()
    }


def not_finite(loss: float, norm: float) -> str:
    """Which of the two was not finite in an update that is left out."""
    values = {"loss": loss, "gradient norm": norm}
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    good = [f"{name} {value:.4g}" for name, value in values.items() if math.isfinite(value)]
    also = f" (the {good[0]} was)" if good else ""
    return f"the {' and the '.join(bad)} {'was' if good else 'were'} not finite{also}"
