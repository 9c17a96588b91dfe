"""Gives results to waiting callers, and waits for work that a background task feeds. Runs anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


def settle(requests: Sequence[tuple[Any, asyncio.Future[Result]]], outcomes: Sequence[Result | Exception]) -> None:
    """Gives each waiting caller its result, or raises its error there."""
    for (_, future), outcome in zip(requests, outcomes, strict=True):
        if future.done():
            continue  # its caller was cancelled
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


async def unless_failed(work: Coroutine[Any, Any, Result], producer: asyncio.Task[None]) -> Result:
    """The result of `work`. Raises the producer's error if that comes first: `work` would then wait forever."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, producer}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        unfinished = not task.done()
        if unfinished:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    if unfinished:
        error = producer.exception()
        while isinstance(error, BaseExceptionGroup):  # many rollouts may fail from one cause; the first error names it
            error = error.exceptions[0]
        raise error or RuntimeError("the rollout producer ended by itself")
    return await task
