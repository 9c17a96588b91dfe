"""The learner group: one `Learner` per device as Ray actors, seen as one object."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa


class LearnerGroup:
    """`learner.roles.LearnerGroup` over the actors of the ranks. Rank 0 publishes and saves."""

    def __init__(self, ranks: list[Any], *, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._step = 0

    @property
    def step(self) -> int:
        return self._step

    async def start(self, timeout_s: float) -> None:
        """Waits until every rank has loaded its networks."""
        await self._wait("start", [rank.ready.remote() for rank in self._ranks], timeout_s=timeout_s)

    async def update(self, table: pa.Table) -> dict[str, float]:
        stats = await self._wait("update", [rank.update.remote(table) for rank in self._ranks])
        self._step += 1
        return stats[0]

    async def publish(self) -> Any:
        """The object reference of a WeightSet. As a call's result it is owned here and outlives the rank."""
        version, weights = self._ranks[0].publish.options(num_returns=2).remote()
        await self._wait("publish weights", [version])
        return weights

    async def save(self, directory: Path) -> None:
        await self._wait("save a checkpoint", [self._ranks[0].save.remote(directory.resolve())])

    async def restore(self, directory: Path) -> None:
        steps = await self._wait(
            "restore a checkpoint", [rank.restore.remote(directory.resolve()) for rank in self._ranks]
        )
        self._step = steps[0]

    async def save_policy(self, directory: Path) -> None:
        await self._wait("save the policy", [self._ranks[0].save_policy.remote(directory.resolve())])

    async def _wait(self, what: str, calls: list[Any], *, timeout_s: float | None = None) -> list[Any]:
        limit = timeout_s or self._timeout_s
        try:
            return await asyncio.wait_for(asyncio.gather(*calls), limit)
        except TimeoutError as error:
            raise RuntimeError(f"the learner did not {what} at step {self._step} within {limit:g} s") from error
