"""The deaths in one pool: how long to wait before a replacement, and when deaths end the run. Runs in the driver."""

from __future__ import annotations

import math
import re
import time

from common.errors import death_reason

# This many deaths of one cause, one after the other and with no call answered in between, end the run: replacements
# would die the same way.
MAX_DEATHS = 3
# Delay before replacing a dead replica, seconds: the first one, and the longest. It doubles with every death, and
# starts again once a replica has served for longer than the longest delay.
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0

# The parts of a message that differ between two deaths of one cause: addresses, process ids, counts.
_NUMBERS = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|\d+")


class Deaths:
    """Counts deaths by cause, and delays replacements."""

    def __init__(self) -> None:
        self.last_error: BaseException | None = None
        self.wait_until = 0.0  # on time.monotonic's clock; no replica is created before this time
        self._counted_at = -math.inf  # time of the newest death that counted
        self._backoff_s = 0.0
        self._causes: list[str] = []  # since the last answered call; all the same
        self._gave_up = False  # a call has been given up since the last answered call

    def record(self, error: BaseException, *, began: float, served_s: float, tried_alone: bool) -> bool:
        """Records a death. Returns True if it must end the run. `began`: when the replica found room, on
        time.monotonic's clock. `tried_alone`: it died while it ran only the suspect of `Pool.call`.

        A death counts only if the replica began after the last death that counted: a node that dies may end several
        replicas at once, and that is one death. The first death with `tried_alone` does not count: the call caused it,
        and one request that kills every process must not end the run.
        """
        self.last_error, now = error, time.monotonic()
        first_alone = tried_alone and not self._gave_up
        self._gave_up |= first_alone
        counts = began >= self._counted_at and not first_alone
        if counts:
            doubled = 0.0 if served_s > MAX_BACKOFF_S else min(2 * self._backoff_s, MAX_BACKOFF_S)
            self._backoff_s, self._counted_at = max(BACKOFF_S, doubled), now
        self.wait_until = now + max(BACKOFF_S, self._backoff_s)
        if not counts:
            return False
        cause = _NUMBERS.sub("", death_reason(error))
        self._causes = [*self._causes, cause] if cause in self._causes else [cause]
        return len(self._causes) >= MAX_DEATHS

    def forget(self) -> None:
        """Forgets the deaths so far. Called when a call was answered, because the role then still works."""
        self._causes.clear()
        self._gave_up = False


def drop_tracebacks(error: BaseException | None) -> None:
    """Removes the tracebacks of an error that is kept for messages. Their frames refer to the weights that were sent to
    the replica, and would keep these weights in the object store until another replica dies."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
