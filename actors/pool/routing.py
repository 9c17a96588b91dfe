"""Which replica gets the next call: the least loaded one that may take it, in the order in which calls come."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque


class Router:
    """Calls outstanding and their cost, by replica. What an operation takes grows with the logarithm of the number of
    open replicas, and not with the number of calls that wait.

    A replica is known by a number that no other ever has. It takes at most `in_flight` calls at a time; a closed one
    keeps those it has and gets no more.
    """

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._open: set[int] = set()
        self._calls: dict[int, int] = {}
        self._cost: dict[int, int] = {}
        # (cost, replica), least first. An entry is outdated when the replica's cost has changed, and is passed over.
        self._heap: list[tuple[int, int]] = []
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()
        self._failure: BaseException | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def calls(self, key: int) -> int:
        """How many it has now."""
        return self._calls.get(key, 0)

    def cost(self, key: int) -> int:
        return self._cost.get(key, 0)

    def open(self, key: int) -> None:
        """From here on calls may go to this replica."""
        self._open.add(key)
        self._calls.setdefault(key, 0)
        self._cost.setdefault(key, 0)
        self._offer(key)
        self._serve()

    def close(self, key: int) -> None:
        self._open.discard(key)

    def forget(self, key: int) -> None:
        """The replica is gone, and with it whatever it had."""
        self._open.discard(key)
        self._calls.pop(key, None)
        self._cost.pop(key, None)

    async def acquire(self, cost: int) -> int:
        """The replica for one call. Waits, however long, until one has room; raises what `fail` was given."""
        if self._failure is not None:
            raise self._failure
        if not self._waiting and (key := self._least()) is not None:
            self._take(key, cost)
            return key
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((cost, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(turn.result(), cost)  # its turn had come, but nobody was there any more
            raise

    def release(self, key: int, cost: int) -> None:
        """A call has ended, however."""
        if key in self._calls:
            self._calls[key] -= 1
            self._cost[key] -= cost
            self._offer(key)
            self._serve()

    def fail(self, error: BaseException) -> None:
        """Nothing will ever be routed again: every caller, waiting or to come, gets the error."""
        self._failure = error
        while self._waiting:
            _, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def _serve(self) -> None:
        while self._waiting and (key := self._least()) is not None:
            cost, turn = self._waiting.popleft()
            if not turn.done():
                self._take(key, cost)
                turn.set_result(key)

    def _least(self) -> int | None:
        heap = self._heap
        while heap:
            cost, key = heap[0]
            if key in self._open and cost == self._cost[key] and self._calls[key] < self._in_flight:
                return key
            heapq.heappop(heap)
        return None

    def _take(self, key: int, cost: int) -> None:
        self._calls[key] += 1
        self._cost[key] += cost
        self._offer(key)

    def _offer(self, key: int) -> None:
        if key in self._open and self._calls[key] < self._in_flight:
            heapq.heappush(self._heap, (self._cost[key], key))
            if len(self._heap) > 8 * len(self._open) + 64:  # mostly outdated by now
                self._heap = [(self._cost[n], n) for n in self._open if self._calls[n] < self._in_flight]
                heapq.heapify(self._heap)
