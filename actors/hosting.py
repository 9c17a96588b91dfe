"""How a role's plain class becomes a Ray actor: what it reserves, its process' environment, where its meters go."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util import metrics

import common
from common import meters
from common.config import Placed, TrainerConfig
from common.meters import Meter

# Ray drops a gauge that was not set for two of its reports (RAY_metrics_report_interval_ms, at least 1 s each).
_REFRESH_S = 1.0


def actor(role: type, cfg: Placed, label: str = "") -> Any:
    """The Ray actor class of a role, with what its section reserves. An actor is shown, and its meters are tagged, by
    `label`, or by its first argument, its name such as Generator(2)."""
    return ray.remote(_hosted(role, label)).options(
        num_cpus=cfg.cpus, num_gpus=cfg.gpus, runtime_env={"env_vars": worker_environment(cfg)}
    )


def _hosted(role: type, label: str) -> type:
    """The role, whose process exports its meters."""

    class Hosted(role):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._label = label or (args[0] if args and isinstance(args[0], str) else role.__name__)
            meters.install(RayMeters(), role=role.__name__, replica=self._label)
            super().__init__(*args, **kwargs)

        def __repr__(self) -> str:  # in Ray's dashboard and logs
            return self._label

    Hosted.__name__, Hosted.__qualname__, Hosted.__module__ = role.__name__, role.__qualname__, role.__module__
    return Hosted


class RayMeters:
    """Exports meters through the node's metrics agent as `ray_<name>`."""

    def __init__(self) -> None:
        self._exported: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, name="meters", daemon=True).start()

    def record(self, meter: Meter, value: float, tags: Mapping[str, str]) -> None:
        with self._lock:
            exported = self._exported.get(meter.name) or self._exported.setdefault(meter.name, _export(meter))
            if meter.kind == "gauge":
                self._gauges[meter.name, tuple(tags.items())] = value
            exported._record(float(value), dict(tags))  # as inc, set and observe do; but inc refuses 0

    def close(self) -> None:
        """Ends the refreshing of gauges, before Ray does."""
        self._closed.set()

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_S):
            with self._lock:
                for (name, tags), value in self._gauges.items():
                    self._exported[name]._record(value, dict(tags))


def _export(meter: Meter) -> Any:
    help_, tags = f"{meter.help}, {meter.unit}", meter.tags
    match meter.kind:
        case "counter":
            return metrics.Counter(meter.name, help_, tags)
        case "gauge":
            return metrics.Gauge(meter.name, help_, tags)
        case "histogram":
            return metrics.Histogram(meter.name, help_, list(meter.buckets), tags)


def worker_environment(cfg: Placed) -> dict[str, str]:
    """Environment of a role's process: quiet, and able to import what the driver can."""
    project = str(Path(common.__path__[0]).parent)
    passed_on = {key: os.environ[key] for key in ("HF_HUB_OFFLINE", "RATCHET_CACHE") if key in os.environ}
    environment = {
        "OMP_NUM_THREADS": str(cfg.threads),
        # Ours first: a user's own `common` beside the reward functions must not hide this one.
        "PYTHONPATH": os.pathsep.join(filter(None, [project, os.getcwd(), os.environ.get("PYTHONPATH")])),
        # glibc gives every large tensor back to the kernel and faults its pages in again at the next one: keeping them
        # makes an update 15 % faster (135M, two cores).
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_ARENA_MAX": "1",  # other threads' arenas cannot keep what is large
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **passed_on,
    }
    if isinstance(cfg, TrainerConfig):
        # A small block in its thread's cache, which counts as used, keeps its two large free neighbours apart for good:
        # without that cache a learner takes 4 % less memory. An engine is slower without it.
        others = os.environ.get("GLIBC_TUNABLES")
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, [others, "glibc.malloc.tcache_count=0"]))
    return environment
