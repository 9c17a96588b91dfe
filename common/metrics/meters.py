"""Values that a process counts while it works: `count`, `gauge` and `observe` record them by name. Runs anywhere.

The recorder does not know where values go. A Ray process exports them (actors/pool/ray_meters.py); any other process
keeps them in memory, where tests read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from common.metrics.table import METERS, OWN, Meter


class Backend(Protocol):
    """The place where recorded values go."""

    def record(self, meter: Meter, value: float, tags: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge, or observe a histogram. Adding 0 creates the counter."""


class InMemory:
    """Keeps the sum of a counter, the newest value of a gauge, and all values of a histogram."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}

    def record(self, meter: Meter, value: float, tags: Mapping[str, str]) -> None:
        values = self._values.setdefault((meter.name, frozenset(tags.items())), [])
        if meter.kind == "counter":
            values[:] = [sum(values) + value]
        elif meter.kind == "gauge":
            values[:] = [value]
        else:
            values.append(value)

    def read(self, name: str, **tags: str) -> list[float]:
        """The values recorded under exactly these tags; for a counter or gauge at most one."""
        return list(self._values.get((name, frozenset(tags.items())), []))


_backend: Backend = InMemory()
_own = {"role": "", "replica": ""}


def install(backend: Backend, *, role: str = "", replica: str = "") -> None:
    """Record with `backend` from now on, under this role and replica."""
    global _backend, _own
    _backend, _own = backend, {"role": role, "replica": replica}


def count(name: str, amount: float = 1, **tags: str) -> None:
    """Add to a counter. Add 0 when the process starts: Prometheus' `rate` misses an increment from nothing."""
    _record("counter", name, amount, tags)


def gauge(name: str, value: float, **tags: str) -> None:
    """Set a gauge."""
    _record("gauge", name, value, tags)


def observe(name: str, value: float, **tags: str) -> None:
    """Add one value to a histogram."""
    _record("histogram", name, value, tags)


def _record(kind: str, name: str, value: float, tags: Mapping[str, str]) -> None:
    meter = METERS.get(name)
    if meter is None or meter.kind != kind:
        raise ValueError(f"{name} is not a declared {kind}; declare it in common/metrics/table.py")
    if kind == "counter" and value < 0:
        raise ValueError(f"{name} is a counter and cannot go down by {-value:g}; use a gauge")
    full = {**{tag: _own[tag] for tag in OWN if tag in meter.tags}, **tags}
    if set(full) != set(meter.tags):
        raise ValueError(f"{name} takes the tags {list(meter.tags)}, not {list(full)}")
    _backend.record(meter, value, full)
