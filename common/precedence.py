"""Which processes that a run needs wait for a node. Extra replicas of its pools make room for them.

Runs in the driver. Without this, generators above `generators.min` could take the CPU or GPU that the learner asks for
at the same moment, and the run would wait until it fails.
"""

from __future__ import annotations

import time
from typing import Any

# Seconds that a needed process waits before a running extra replica of each pool ends, and again before the next one.
GIVE_WAY_S = 10.0
# An autoscaler adds nodes for everything that waits at once. Seconds that it gets before extra replicas make room.
AUTOSCALER_S = 120.0


class Precedence:
    """The needed processes of one run that have no node."""

    def __init__(self, *, autoscaler: bool = False) -> None:
        self._patience_s = AUTOSCALER_S if autoscaler else 0.0
        self._since: dict[Any, float] = {}  # by pool or group of ranks

    def wait(self, who: Any) -> None:
        """A process of this pool or group of ranks waits for a node, and the run needs it."""
        self._since.setdefault(who, time.monotonic())

    def end_wait(self, who: Any) -> None:
        """It needs no node any more."""
        self._since.pop(who, None)

    @property
    def waited_s(self) -> float | None:
        """Seconds for which extra replicas have had to make room; None if nothing waits, or an autoscaler still has
        time to add nodes."""
        longest = time.monotonic() - min(self._since.values(), default=float("inf"))
        return longest - self._patience_s if longest >= self._patience_s else None
