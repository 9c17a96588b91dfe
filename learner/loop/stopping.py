"""What a training loop still does when it is told to stop. Runs in the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from learner.ranks.checkpoint import Checkpoints

T = TypeVar("T")


class Saves(Protocol):
    """A learner group, as far as a checkpoint needs it."""

    @property
    def step(self) -> int: ...

    async def save(self, directory: Path) -> None: ...


async def completed(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` to its end even if the caller is cancelled meanwhile; only then the cancellation is raised."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def save_now(learner: Saves, checkpoints: Checkpoints) -> None:
    """Writes a checkpoint of the learner's step, unless there is one or nothing was learned yet."""
    path = checkpoints.path(learner.step)
    if learner.step and path != checkpoints.newest():
        await learner.save(path)
        checkpoints.prune()
