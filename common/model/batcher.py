"""Batches forward passes: requests that arrive close together share a pass, under a token budget. Runs anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from common.futures import settle
from common.metrics import meters
from common.model.batches import token_batches

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Turns many single requests into few batched calls of `run`.

    The first request of an idle batcher waits `window_s` for others. Requests that arrive during a pass share the next
    one. Batches have similar lengths and at most `max_tokens`, padding included. Only one pass runs at once. `run` must
    not block the event loop, so that requests are still accepted during a pass.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        *,
        num_tokens: Callable[[Item], int],
        max_tokens: int,
        window_s: float,
    ) -> None:
        self._run = run
        self._num_tokens = num_tokens
        self._max_tokens = max_tokens
        self._window_s = window_s
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """The result of this item. An error in a pass is raised to every request that shared it."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        """Runs passes until no request waits."""
        await asyncio.sleep(self._window_s)
        while self._waiting:
            batch, self._waiting = self._waiting, []
            for group in token_batches([self._num_tokens(item) for item, _ in batch], self._max_tokens):
                requests = [batch[i] for i in group]
                meters.observe("ratchet_batch_rollouts", len(requests))
                meters.observe("ratchet_batch_tokens", sum(self._num_tokens(item) for item, _ in requests))
                await self._pass(requests)

    async def _pass(self, requests: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._run([item for item, _ in requests])
        except Exception as error:
            settle(requests, [error] * len(requests))
            return
        settle(requests, results)
