"""Meters: what the processes of a run count while they work. One list of them all, and how a value is recorded.

A process records by name and knows nothing of where values go: a Ray process exports them
(actors/pool/ray_meters.py), any other keeps them in memory, where tests read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

OWN = ("role", "replica")  # of the process that records, as `install` was told
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_TOKENS = (64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


@dataclass(frozen=True)
class Meter:
    """Named by Prometheus' conventions: base units, counters end in _total."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    tags: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()  # upper ends, of a histogram


METERS = {
    meter.name: meter
    for meter in (
        Meter("ratchet_generator_rollouts_total", "counter", "rollouts", OWN, "rollouts written to their end"),
        Meter("ratchet_generator_tokens_total", "counter", "tokens", OWN, "response tokens of these rollouts"),
        Meter("ratchet_generator_nonfinite_total", "counter", "rollouts", OWN, "a log-probability is not finite"),
        Meter("ratchet_generator_requests", "gauge", "requests", (*OWN, "state"), "in the engine now"),
        Meter("ratchet_generator_weights_version", "gauge", "versions", OWN, "policy version sampled from"),
        Meter("ratchet_generator_stage_seconds", "histogram", "seconds", OWN, "staging one update", _SECONDS),
        Meter("ratchet_generator_swap_seconds", "histogram", "seconds", OWN, "no token sampled, per update", _SECONDS),
        Meter("ratchet_scored_rollouts_total", "counter", "rollouts", OWN, "rollouts scored or measured"),
        Meter("ratchet_reward_voids_total", "counter", "rollouts", (*OWN, "source"), "given no score by this source"),
        Meter("ratchet_batch_rollouts", "histogram", "rollouts", OWN, "rollouts of one forward pass", _COUNTS),
        Meter("ratchet_batch_tokens", "histogram", "tokens", OWN, "tokens of one forward pass", _TOKENS),
        Meter("ratchet_pool_replicas", "gauge", "replicas", ("role", "state"), "replicas in this state"),
        Meter("ratchet_pool_joins_total", "counter", "replicas", ("role",), "replicas that became routable"),
        Meter("ratchet_pool_leaves_total", "counter", "replicas", ("role", "reason"), "replicas that left"),
        Meter("ratchet_pool_reissues_total", "counter", "calls", ("role",), "calls sent again, to another replica"),
        Meter("ratchet_pool_waiting_calls", "gauge", "calls", ("role",), "calls that wait for a replica with room"),
        Meter(
            "ratchet_pool_startup_seconds", "histogram", "seconds", ("role",), "from having room to routable", _SECONDS
        ),
    )
}


class Backend(Protocol):
    def record(self, meter: Meter, value: float, tags: Mapping[str, str]) -> None:
        """Adds to a counter (also 0: it then exists), sets a gauge, or observes in a histogram."""


class InMemory:
    """Keeps values: the sum of a counter, the newest of a gauge, all of a histogram."""

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
        """What was recorded under exactly these tags; of a counter or gauge one value, or none."""
        return list(self._values.get((name, frozenset(tags.items())), []))


_backend: Backend = InMemory()
_own = {"role": "", "replica": ""}


def install(backend: Backend, *, role: str = "", replica: str = "") -> None:
    """From here on this process records with `backend`, under this role and replica."""
    global _backend, _own
    _backend, _own = backend, {"role": role, "replica": replica}


def count(name: str, amount: float = 1, **tags: str) -> None:
    """Adds to a counter. 0 lets it begin: only then does a rate see its first increment."""
    _record("counter", name, amount, tags)


def gauge(name: str, value: float, **tags: str) -> None:
    """Sets a gauge."""
    _record("gauge", name, value, tags)


def observe(name: str, value: float, **tags: str) -> None:
    """One more value of a histogram."""
    _record("histogram", name, value, tags)


def _record(kind: str, name: str, value: float, tags: Mapping[str, str]) -> None:
    meter = METERS.get(name)
    if meter is None or meter.kind != kind:
        raise ValueError(f"{name} is no declared {kind}; declare it in common/meters.py")
    if kind == "counter" and value < 0:
        raise ValueError(f"{name} is a counter and cannot go down by {-value:g}; use a gauge")
    full = {**{tag: _own[tag] for tag in OWN if tag in meter.tags}, **tags}
    if set(full) != set(meter.tags):
        raise ValueError(f"{name} takes the tags {list(meter.tags)}, not {list(full)}")
    _backend.record(meter, value, full)
