"""Metrics with explicit reducers: how partial values become one number is said where they are recorded."""

from __future__ import annotations

import math


class Metrics:
    """Collects the partial values of one step. Keys are paths such as `ppo/clip_frac`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._values: dict[str, float] = {}

    def mean(self, key: str, total: float, count: float) -> None:
        """Reduced to sum of totals over sum of counts."""
        old_total, old_count = self._sums.get(key, (0.0, 0.0))
        self._sums[key] = (old_total + float(total), old_count + float(count))

    def maximum(self, key: str, value: float) -> None:
        """Reduced to the largest."""
        old = self._values.get(key, -math.inf)
        # NaN compares false with everything: it must win, not vanish.
        self._values[key] = old if math.isnan(old) or value <= old else float(value)

    def last(self, key: str, value: float) -> None:
        """Reduced to the newest."""
        self._values[key] = float(value)

    def sums(self) -> dict[str, tuple[float, float]]:
        """(total, count) of every mean so far."""
        return dict(self._sums)

    def result(self) -> dict[str, float]:
        means = {key: total / count if count else 0.0 for key, (total, count) in self._sums.items()}
        return {**means, **self._values}
