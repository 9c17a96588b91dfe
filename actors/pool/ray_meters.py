"""Exports the meters of a Ray process through the metrics agent of its node. Runs anywhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ray.util import metrics

from common.metrics.table import Meter

# Ray drops a gauge that was not set during two of its reports (RAY_metrics_report_interval_ms, at least 1 s each).
_REFRESH_S = 1.0


class RayMeters:
    """The `Backend` of a Ray process. A meter NAME is exported as `ray_NAME`."""

    def __init__(self) -> None:
        self._exported: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, name="meters", daemon=True).start()

    def record(self, meter: Meter, value: float, tags: Mapping[str, str]) -> None:
        """Adds to a counter, sets a gauge, or observes a histogram."""
        with self._lock:
            exported = self._exported.get(meter.name) or self._exported.setdefault(meter.name, _export(meter))
            if meter.kind == "gauge":
                self._gauges[meter.name, tuple(tags.items())] = value
            exported._record(float(value), dict(tags))  # inc, set and observe call this too, but inc refuses 0

    def close(self) -> None:
        """Stops refreshing the gauges; called before Ray shuts down."""
        self._closed.set()

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_S):
            with self._lock:
                for (name, tags), value in self._gauges.items():
                    self._exported[name]._record(value, dict(tags))


def _export(meter: Meter) -> Any:
    help_, tags = f"{meter.meaning}, {meter.unit}", meter.tags
    match meter.kind:
        case "counter":
            return metrics.Counter(meter.name, help_, tags)
        case "gauge":
            return metrics.Gauge(meter.name, help_, tags)
        case "histogram":
            return metrics.Histogram(meter.name, help_, list(meter.buckets), tags)
