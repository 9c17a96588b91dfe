"""How many replicas a pool may have now, and which ones leave first if it has more. Runs in the driver."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from actors.pool.replica import STATES, Replica
from actors.pool.routing import Router

# Seconds that a needed process waits before each pool ends a running extra replica, and again before the next one.
GIVE_WAY_S = 10.0


class Size:
    """The number of replicas that one pool may have. Those above `min` are extra."""

    def __init__(self, min_replicas: int) -> None:
        self._min = min_replicas
        self._gave_way_at = 0.0  # when a replica last made room or was leaving; time.monotonic

    def allowed(self, target: int, replicas: Collection[Replica], waited_s: float | None) -> int:
        """The target, or fewer while a process that the run needs waits for a node: then extra replicas without a node
        are withdrawn, and running ones end one after the other. `waited_s`: seconds for which extra replicas have had
        to make room; None if they need not."""
        if waited_s is None:
            return target
        now, placed = time.monotonic(), num_placed(replicas)
        if any(replica.state == "leaving" for replica in replicas):
            self._gave_way_at = now  # its room may be enough
        elif placed > self._min and min(waited_s, now - self._gave_way_at) >= GIVE_WAY_S:
            self._gave_way_at, placed = now, placed - 1
        return min(target, max(self._min, placed))


def num_placed(replicas: Iterable[Replica]) -> int:
    """How many replicas have a node and are not leaving."""
    return sum(replica.state in ("starting", "ready") for replica in replicas)


def leave_first(staying: Collection[Replica], router: Router) -> list[Replica]:
    """The replicas in the order in which they leave: first those that are not ready, then the least loaded, then the
    newest. The node with the fewest replicas is emptied before the next one, because an autoscaler removes only empty
    nodes."""
    here: dict[str | None, list[Replica]] = {}
    for replica in staying:
        here.setdefault(replica.node, []).append(replica)

    def key(r: Replica) -> tuple[int, ...]:
        node = here[r.node]
        costs, newest = sum(router.cost(other.number) for other in node), max(other.number for other in node)
        return STATES.index(r.state), len(node), costs, -newest, router.cost(r.number), -r.number

    return sorted(staying, key=key)
