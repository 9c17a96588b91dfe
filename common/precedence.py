"""Which processes that a run needs wait for a node. Extra replicas of its pools make room for them.

Runs in the driver. Without this, generators above `generators.min` could take the CPU or GPU that the learner asks for
at the same moment, and the run would wait until it fails.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config.base import Placed


@dataclass(frozen=True)
class _Wait:
    """Needed processes of one role wait for a node. `asks`: the section of the config with the resources of each."""

    role: str
    asks: Placed
    since: float  # time.monotonic


class Precedence:
    """The needed processes of one run that have no node."""

    def __init__(self, patience_s: float = 0.0) -> None:
        """`patience_s`: seconds that needed processes wait before extra replicas make room. In this time an autoscaler
        can add nodes for everything that waits."""
        self._patience_s = patience_s
        self._waits: dict[Any, _Wait] = {}  # by pool or group of ranks

    def wait(self, who: Any, role: str, asks: Placed) -> None:
        """A process of this pool or group of ranks waits for a node, and the run needs it."""
        self._waits.setdefault(who, _Wait(role, asks, time.monotonic()))

    def end_wait(self, who: Any) -> None:
        """Ends a `wait`, if there is one."""
        self._waits.pop(who, None)

    def waits_s(self, extra: Placed) -> Mapping[str, float]:
        """The roles for which extra replicas with these resources must make room, and the seconds since then."""
        patient_until = time.monotonic() - self._patience_s
        return {
            wait.role: patient_until - wait.since
            for wait in self._waits.values()
            if wait.since <= patient_until and _room_may_help(extra, wait.asks)
        }


def _room_may_help(extra: Placed, asks: Placed) -> bool:
    """True if both reserve CPUs, or both reserve GPUs, and a node may have the labels of both. Amounts are not
    compared, because several replicas together may have enough."""
    same_kind = (extra.cpus > 0 and asks.cpus > 0) or (extra.gpus > 0 and asks.gpus > 0)
    return same_kind and all(extra.labels.get(key, value) == value for key, value in asks.labels.items())
