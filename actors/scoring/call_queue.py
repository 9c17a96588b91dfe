"""Answers wait here for their turn: up to `batch` of them go into one call, and up to `concurrency` calls overlap. Runs
in each reward replica."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from common.reward_input import RewardInput

Result = TypeVar("Result")
Waiting = tuple[RewardInput, "asyncio.Future[Result]"]  # an answer and its caller, who waits for its result


class CallQueue(Generic[Result]):
    """`call` is given the answers of one call with their futures. It must give every future a result or an error."""

    def __init__(
        self, call: Callable[[Sequence[Waiting[Result]]], Awaitable[None]], *, batch: int, concurrency: int
    ) -> None:
        self._call, self._batch, self._concurrency = call, batch, concurrency
        self._waiting: deque[Waiting[Result]] = deque()
        self._workers: set[asyncio.Task[None]] = set()  # each of them will look at `_waiting` again

    async def submit(self, answer: RewardInput) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, future))
        if len(self._workers) < self._concurrency:
            self._workers.add(asyncio.create_task(self._work()))
        return await future

    async def _work(self) -> None:
        """Makes calls until no answer waits. It then leaves `_workers` itself, without a pause: a done callback would
        run later, and an answer that `submit` adds in between would find no worker."""
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            if waiting := [(answer, future) for answer, future in taken if not future.done()]:  # not cancelled
                await self._call(waiting)
        task = asyncio.current_task()
        assert task is not None
        self._workers.remove(task)
