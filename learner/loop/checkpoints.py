"""The checkpoints of a run: which exist, which are due, and the one that a signal asks for. Runs in the driver.

learner/ranks/checkpoint.py writes and reads them, in the ranks.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

COMPLETE = "COMPLETE"  # a file that is written last: a checkpoint without it was cut short by a crash


class Checkpoints:
    """RUN/checkpoints/step-000100 holds the learner after 100 updates."""

    def __init__(self, directory: Path, *, every: int, keep: int) -> None:
        self._directory = directory
        self._every = every
        self._keep = keep

    def due(self, step: int, num_steps: int) -> bool:
        return step % self._every == 0 or step == num_steps

    def path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self._complete()), None)

    def prune(self) -> None:
        """Removes all checkpoints except the newest `keep` complete ones. This removes those that a crash cut short."""
        kept = self._complete()[-self._keep :]
        for directory in self._directory.glob("step-*"):
            if directory not in kept:
                shutil.rmtree(directory)

    def _complete(self) -> list[Path]:
        return sorted(marker.parent for marker in self._directory.glob(f"step-*/{COMPLETE}"))


class Saves(Protocol):
    """The part of a learner group that a checkpoint needs."""

    @property
    def step(self) -> int: ...

    async def save(self, directory: Path) -> None: ...


async def save_now(learner: Saves, checkpoints: Checkpoints) -> None:
    """Writes a checkpoint of the learner's step, unless there is one or nothing was learned yet."""
    path = checkpoints.path(learner.step)
    if learner.step and path != checkpoints.newest():
        await learner.save(path)
        checkpoints.prune()


async def completed(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` to its end, even if the caller is cancelled during it. Then it raises the cancellation."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
