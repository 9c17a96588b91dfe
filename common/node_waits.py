"""Tells the user which processes wait for a node, what each of them asks for, and for how long. Runs in the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.config.base import Placed

# Seconds without a node after which the user is told, and those between two further messages. On a busy machine a
# process may take some seconds to start, although it has room.
TELL_AFTER_S, TELL_EVERY_S = 10.0, 30.0
LOOK_EVERY_S = 1.0  # between two looks at the processes


class NodeWaits:
    """The messages about the processes of one role that the run needs."""

    def __init__(self, asks: Placed, limit: str, tell: Callable[[str], None]) -> None:
        """`asks`: the section of the config with the resources of each process. `limit`: the longest wait, in words.
        `tell` gets a sentence for the user."""
        self._asks, self._limit, self._tell = requested(asks), limit, tell
        self._due_s = TELL_AFTER_S

    def look(self, waits_s: Mapping[str, float]) -> None:
        """Tells the user about the waiting processes, if it is time for that. `waits_s`: for each process without a
        node, seconds since it was asked for."""
        if not waits_s:
            self._due_s = TELL_AFTER_S
            return
        waited_s = max(waits_s.values())
        if waited_s < self._due_s:
            return
        self._due_s = waited_s + TELL_EVERY_S
        verb, each = ("waits", "it asks") if len(waits_s) == 1 else ("wait", "each asks")
        self._tell(
            f"{', '.join(waits_s)} {verb} for a node with room: {waited_s:.0f} s so far ({each} for {self._asks}; "
            f"at most {self._limit})"
        )


class RoomMessages:
    """The messages about a pool whose extra replicas make room: one each time that they have to."""

    def __init__(self, role: str, tell: Callable[[str], None]) -> None:
        self._role, self._tell = role, tell
        self._told = False

    def look(self, waits_s: Mapping[str, float]) -> None:
        """Tells the user that extra replicas make room, if they have had to for TELL_AFTER_S. `waits_s`: the roles for
        which they make room, and the seconds since then."""
        due = max(waits_s.values(), default=0.0) >= TELL_AFTER_S
        if due and not self._told:
            verb = "has a node" if len(waits_s) == 1 else "have nodes"
            self._tell(f"{self._role}: no extra replicas until {' and '.join(waits_s)} {verb}")
        self._told = due


def requested(asks: Placed) -> str:
    """The resources that one process asks the cluster for, in words."""
    counted = [(asks.cpus, "CPU"), (asks.gpus, "GPU")]
    parts = [f"{amount:g} {unit}{'s' if amount > 1 else ''}" for amount, unit in counted if amount]
    labels = ", ".join(f"{key}={value}" for key, value in asks.labels.items())
    return " and ".join(
        [", ".join(parts) or "no CPU and no GPU", *([f"a node with the labels {labels}"] if labels else [])]
    )
