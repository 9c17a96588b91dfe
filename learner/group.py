"""Groups of ranks: one `Learner` or `RewardTrainer` per device as Ray actors, seen as one object."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from common.preferences import Pair


class RankGroup:
    """What every kind of group does. All ranks update; rank 0 publishes and saves."""

    def __init__(self, ranks: list[Any], *, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._step = 0

    @property
    def step(self) -> int:
        return self._step

    async def start(self, timeout_s: float) -> None:
        """Waits until every rank has loaded its networks and met the others."""
        [rendezvous] = await self._wait("start", [self._ranks[0].__ray_call__.remote(_rendezvous)], timeout_s=timeout_s)
        world = len(self._ranks)
        joined = [rank.join.remote(index, world, rendezvous) for index, rank in enumerate(self._ranks)]
        await self._wait("start", joined, timeout_s=timeout_s)

    def stop(self) -> None:
        """Ends every rank, and frees what it reserved."""
        for rank in self._ranks:
            ray.kill(rank)

    async def update(self, batch: Any) -> dict[str, float]:
        stats = await self._wait("update", [rank.update.remote(batch) for rank in self._ranks])
        self._step += 1
        return stats[0]

    async def save(self, directory: Path) -> None:
        await self._wait("save a checkpoint", [self._ranks[0].save.remote(directory.resolve())])

    async def restore(self, directory: Path) -> None:
        steps = await self._wait(
            "restore a checkpoint", [rank.restore.remote(directory.resolve()) for rank in self._ranks]
        )
        self._step = steps[0]

    async def _wait(self, what: str, calls: list[Any], *, timeout_s: float | None = None) -> list[Any]:
        limit = timeout_s or self._timeout_s
        try:
            return await asyncio.wait_for(asyncio.gather(*calls), limit)
        except TimeoutError as error:
            raise RuntimeError(f"the learner did not {what} at step {self._step} within {limit:g} s") from error


class LearnerGroup(RankGroup):
    """`learner.roles.LearnerGroup` over the actors of the ranks."""

    async def publish(self) -> Any:
        """The object reference of a WeightSet. As a call's result it is owned here and outlives the rank."""
        version, weights = self._ranks[0].publish.options(num_returns=2).remote()
        await self._wait("publish weights", [version])
        return weights

    async def save_policy(self, directory: Path) -> None:
        await self._wait("save the policy", [self._ranks[0].save_policy.remote(directory.resolve())])


class RewardTrainerGroup(RankGroup):
    """`learner.reward_training.Trainers` over the actors of the ranks."""

    async def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [N, 2]; the ranks share the pairs."""
        world = len(self._ranks)
        parts = [rank.scores.remote(pairs[index::world]) for index, rank in enumerate(self._ranks)]
        scores = np.empty((len(pairs), 2), dtype=np.float32)
        for index, part in enumerate(await self._wait("score pairs", parts)):
            scores[index::world] = part
        return scores

    async def save_model(self, directory: Path) -> None:
        await self._wait("save the reward model", [self._ranks[0].save_model.remote(directory.resolve())])


def _rendezvous(first: Any) -> str:
    """Called in the first rank's process. Where ranks meet: a file on a cluster that is this machine alone, so that
    nothing listens; else a free port of that rank's node."""
    host = ray.util.get_node_ip_address()
    if host.startswith("127."):
        return f"file://{tempfile.mkdtemp(prefix='ratchet-')}/rendezvous"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"
