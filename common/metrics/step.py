"""The metrics of one step: partial values, reduced as their rows say. Runs in every learner or reward-model rank."""

from __future__ import annotations

import math

from common.metrics.table import REDUCERS


class StepMetrics:
    """Partial values of one step, by key. An undeclared key is a KeyError."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._values: dict[str, float] = {}

    def add(self, key: str, value: float, count: float = 1) -> None:
        """For a mean: `value` is a total over `count` items, and all totals are divided by all counts. A maximum keeps
        the largest value, any other reducer the newest."""
        match REDUCERS[key]:
            case "mean":
                total, counted = self._sums.get(key, (0.0, 0.0))
                self._sums[key] = (total + float(value), counted + float(count))
            case "max":
                old = self._values.get(key, -math.inf)
                # NaN compares false with everything: it must win, not vanish.
                self._values[key] = old if math.isnan(old) or value <= old else float(value)
            case _:
                self._values[key] = float(value)

    def sums(self) -> dict[str, tuple[float, float]]:
        """(total, count) of every mean so far, for other ranks."""
        return dict(self._sums)

    def result(self) -> dict[str, float]:
        """The reduced value of every key so far."""
        means = {key: total / count if count else 0.0 for key, (total, count) in self._sums.items()}
        return {**means, **self._values}
