"""Chooses the replica for each call: the caller's preferred one, or the least loaded one. Runs in the driver.

Calls are served in the order in which they arrive.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque


class Router:
    """The calls of each replica and their cost. An operation takes time logarithmic in the number of open replicas, no
    matter how many calls wait.

    A replica is named by a number that is never reused. It takes at most `in_flight` calls at once. A closed replica
    keeps the calls it has and gets no more.
    """

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._open: set[int] = set()
        self._calls: dict[int, int] = {}
        self._cost: dict[int, int] = {}
        # (cost, replica), smallest first. An entry is outdated, and skipped, if the replica's cost has changed since.
        self._heap: list[tuple[int, int]] = []
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()
        self._failure: BaseException | None = None

    @property
    def num_waiting(self) -> int:
        """Calls that wait for a replica with room."""
        return len(self._waiting)

    def calls(self, number: int) -> int:
        """Calls that the replica has now."""
        return self._calls.get(number, 0)

    def cost(self, number: int) -> int:
        """Cost of these calls together."""
        return self._cost.get(number, 0)

    def open(self, number: int) -> None:
        """Lets the replica get calls from now on."""
        self._open.add(number)
        self._calls.setdefault(number, 0)
        self._cost.setdefault(number, 0)
        self._offer(number)
        self._serve()

    def close(self, number: int) -> None:
        """Sends the replica no new calls."""
        self._open.discard(number)

    def forget(self, number: int) -> None:
        """Removes the replica and all its calls."""
        self._open.discard(number)
        self._calls.pop(number, None)
        self._cost.pop(number, None)

    async def acquire(self, cost: int, prefer: int | None = None) -> int:
        """The replica for one call. Waits without limit until one has room. Raises the error given to `fail`.

        The least loaded open replica with room gets the call. The replica `prefer` gets it instead if it is open, has
        room and is not overloaded: its cost is at most twice the least loaded one's, plus the cost of this call. A call
        that has to wait gets the first replica that has room.
        """
        if self._failure is not None:
            raise self._failure
        if not self._waiting and (number := self._least()) is not None:
            if prefer is not None and self._keeps(prefer, number, cost):
                number = prefer
            self._take(number, cost)
            return number
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # When its turn comes, only one replica has room, so `prefer` decides nothing then.
        self._waiting.append((cost, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(turn.result(), cost)  # the caller was cancelled just after it got a replica
            raise

    def release(self, number: int, cost: int) -> None:
        """A call has ended, successfully or not."""
        if number in self._calls:
            self._calls[number] -= 1
            self._cost[number] -= cost
            self._offer(number)
            self._serve()

    def fail(self, error: BaseException) -> None:
        """Stops routing: every caller that waits or comes later gets the error."""
        self._failure = error
        while self._waiting:
            _, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def _serve(self) -> None:
        while self._waiting and (number := self._least()) is not None:
            cost, turn = self._waiting.popleft()
            if not turn.done():
                self._take(number, cost)
                turn.set_result(number)

    def _keeps(self, preferred: int, least: int, cost: int) -> bool:
        """True if the preferred replica gets a call of this cost instead of the least loaded one."""
        if preferred not in self._open or self._calls[preferred] >= self._in_flight:
            return False
        return self._cost[preferred] <= 2 * self._cost[least] + cost

    def _least(self) -> int | None:
        heap = self._heap
        while heap:
            cost, number = heap[0]
            if number in self._open and cost == self._cost[number] and self._calls[number] < self._in_flight:
                return number
            heapq.heappop(heap)
        return None

    def _take(self, number: int, cost: int) -> None:
        self._calls[number] += 1
        self._cost[number] += cost
        self._offer(number)

    def _offer(self, number: int) -> None:
        if number in self._open and self._calls[number] < self._in_flight:
            heapq.heappush(self._heap, (self._cost[number], number))
            if len(self._heap) > 8 * len(self._open) + 64:  # most entries are outdated by now
                self._heap = [(self._cost[n], n) for n in self._open if self._calls[n] < self._in_flight]
                heapq.heapify(self._heap)
