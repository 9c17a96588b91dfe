"""Metrics with explicit reducers: how partial values become one number is said where they are recorded."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


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


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One JSON line at the end of `path`, on a line of its own whatever a crash left there."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none if it does not exist. A line that a crash cut short is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def wilson_interval(successes: int, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), which stays inside [0, 1] also near its ends."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding must not leave the share outside
