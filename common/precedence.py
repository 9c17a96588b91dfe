"""Which processes that a run needs wait for a node. Extra replicas of its pools make room for them.

Runs in the driver. Without this, generators above `generators.min` could take the CPU or GPU that the learner asks for
at the same moment, and the run would wait until it fails.
"""

from __future__ import annotations

import time
from typing import Any

# Seconds that a needed process waits before each pool ends a running extra replica, and again before the next one.
GIVE_WAY_S = 10.0


class Precedence:
    """The needed processes of one run that have no node. It does not compare what they ask for with what an extra
    replica has: an extra one may end although its room does not help."""

    def __init__(self, patience_s: float = 0.0) -> None:
        """`patience_s`: for so long needed processes wait before extra replicas make room. An autoscaler needs this
        time: it adds nodes for everything that waits."""
        self._patience_s = patience_s
        self._since: dict[Any, float] = {}  # by pool or group of ranks

    def wait(self, who: Any) -> None:
        """A process of this pool or group of ranks waits for a node, and the run needs it."""
        self._since.setdefault(who, time.monotonic())

    def end_wait(self, who: Any) -> None:
        """Ends a `wait`, if there is one."""
        self._since.pop(who, None)

    @property
    def waited_s(self) -> float | None:
        """Seconds since extra replicas must make room; None if they need not."""
        longest = time.monotonic() - min(self._since.values(), default=float("inf"))
        return longest - self._patience_s if longest >= self._patience_s else None
