"""Time limits of a pool's calls. The clocks stop while its replicas sleep. Runs in the driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TimeLimits:
    """The limits of all running calls. `stop` stops their clocks, and `start` lets them continue."""

    def __init__(self) -> None:
        self._left: dict[asyncio.Timeout, float] = {}  # seconds left, as of the newest `stop`
        self._stopped = False

    @asynccontextmanager
    async def limit(self, seconds: float) -> AsyncIterator[asyncio.Timeout]:
        """Raises TimeoutError if the block takes longer."""
        async with asyncio.timeout(None if self._stopped else seconds) as timeout:
            self._left[timeout] = seconds
            try:
                yield timeout
            finally:
                del self._left[timeout]

    def stop(self) -> None:
        if not self._stopped:
            self._stopped, now = True, asyncio.get_running_loop().time()
            for timeout in self._left:
                if (when := timeout.when()) is not None and not timeout.expired():
                    self._left[timeout] = when - now
                    timeout.reschedule(None)

    def start(self) -> None:
        if self._stopped:
            self._stopped, now = False, asyncio.get_running_loop().time()
            for timeout, left in self._left.items():
                if not timeout.expired():
                    timeout.reschedule(now + left)
