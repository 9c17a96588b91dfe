"""A queue of answers to score: up to `batch` of them go into one call, and up to `concurrency` calls overlap. Runs in
each reward replica."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from common.reward_input import RewardInput

Result = TypeVar("Result")
Waiting = tuple[RewardInput, "asyncio.Future[Result]"]  # an answer, and the future on which its caller waits


class CallQueue(Generic[Result]):
    """`call` gets the answers of one call with their futures. It must set a result or an error on every future."""

    def __init__(
        self, call: Callable[[Sequence[Waiting[Result]]], Awaitable[None]], *, batch: int, concurrency: int
    ) -> None:
        self._call, self._batch, self._concurrency = call, batch, concurrency
        self._waiting: deque[Waiting[Result]] = deque()
        self._workers: set[asyncio.Task[None]] = set()  # each one looks at `_waiting` again before it ends

    async def submit(self, answer: RewardInput) -> Result:
        """The result of this answer. Waits for its turn and for its call; raises the error of the call."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, future))
        if len(self._workers) < self._concurrency:
            self._workers.add(asyncio.create_task(self._work()))
        return await future

    async def _work(self) -> None:
        """Makes calls until no answer waits. Then it removes itself from `_workers` with no await in between. A done
        callback would run later: `submit` would still count this worker, and a new answer would wait forever."""
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            if waiting := [(answer, future) for answer, future in taken if not future.done()]:  # not cancelled
                await self._call(waiting)
        task = asyncio.current_task()
        assert task is not None
        self._workers.remove(task)
