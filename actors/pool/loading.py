"""Sends new weights to every generator of a pool, and to generators that join later. Runs in the driver.

Only references to the weights pass through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.pool.membership import TICK_S
from actors.pool.pool import Pool
from actors.pool.replica import Replica
from common.errors import CorruptWeightsError, RankLostError, RoleError, RolloutLostError
from common.types import Manifest, PublishedBucket


class WeightLoader:
    """Loads each publication into every replica of a pool, and keeps the references to the newest one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._newest: _Published | None = None  # None: nothing was loaded yet

    @property
    def version(self) -> int | None:
        """The learner's newest version."""
        return None if self._newest is None else self._newest.version

    async def load(self, weights: AsyncGenerator[PublishedBucket | Manifest, None], version: int) -> dict[str, float]:
        """Every replica fetches and stages each bucket while the learner packs the next ones. Then all replicas swap.
        Returns the metrics `weights/bytes` and `weights/pause_s`.

        If the learner is lost meanwhile, its RankLostError ends the load, and the loop loads the same version again
        from a new group. Replicas then drop what they have staged. Those that already use this version load it again.
        """
        full: list[Any] = []  # references to all Buckets so far
        sent: dict[int, _Sent] = {}  # by the replica's number

        async def stage(replica: Replica, best: Sequence[Any] = ()) -> None:
            """Sends the newest buckets in their best form, or in full all buckets that the replica lacks."""
            done = sent.get(replica.number)
            if done is None:  # a replica can use deltas if it holds the previous version and gets all of them
                usable = replica.version == self.version and len(full) == len(best)
                done = sent[replica.number] = _Sent(deltas=usable)
            if done.deltas:
                done.num_best += len(best)
                try:
                    await self._stage(replica, version, best)
                    return
                except CorruptWeightsError:
                    done.deltas = False
            await self._stage(replica, version, full[done.num_full :])
            done.num_full = len(full)

        async def swap(replica: Replica) -> float:
            self._pool.members.suspend(replica, "new weights")
            await stage(replica)  # sends all buckets to a replica that joined after the last one
            pause_s = await self._swap(replica, version)
            self._pool.members.resume(replica, "new weights")
            return pause_s

        manifest = Manifest((), ())
        async with aclosing(weights):
            async for item in weights:
                if isinstance(item, Manifest):
                    manifest = item
                else:
                    full.append(item.full)
                    await self._pool.each(partial(stage, best=[item.best]))
                del item  # so that the object store can free the delta
        self._newest = _Published(version, full)  # from here on, replicas that join take this version
        pauses = await self._pool.each(swap)
        return {
            "weights/bytes": sum(done.num_bytes(manifest) for done in sent.values()),
            "weights/pause_s": max(pauses.values(), default=0.0),
        }

    async def catch_up(self, replica: Replica) -> None:
        """Gives a new replica the newest weights, and repeats it if newer ones were published meanwhile."""
        held: _Published | None = None
        while (newest := self._newest) is not None and newest is not held:
            try:
                await self._stage(replica, newest.version, newest.buckets)
                await self._swap(replica, newest.version)
                held = newest
            except RankLostError:  # the loop will notice it too, and load the weights of a new group
                while self._newest is newest:
                    await asyncio.sleep(TICK_S)

    async def _stage(self, replica: Replica, version: int, parts: Sequence[Any]) -> None:
        """Raises RankLostError if the weights were lost with a node."""
        if not parts:
            return
        what = f"stage weights version {version}"
        try:
            await self._pool.ask(replica, what, lambda handle: handle.stage.remote(*parts))
        except RolloutLostError as error:
            message = f"weights version {version} were lost with the node of the rank that packed them"
            raise RankLostError(message) from error

    async def _swap(self, replica: Replica, version: int) -> float:
        """Returns the engine's pause in seconds."""
        what = f"swap in weights version {version}"
        held, pause_s = await self._pool.ask(replica, what, lambda handle: handle.swap.remote(version))
        if held != version:
            raise RoleError(f"{replica.name} was to load weights version {version}, but it holds version {held}")
        replica.version = held
        return pause_s


@dataclass(frozen=True, eq=False)  # a version that is published again is another object
class _Published:
    """A version that was published completely, and references to its Buckets."""

    version: int
    buckets: Sequence[Any]


@dataclass
class _Sent:
    """The new buckets that one replica got: the first `num_best` in best form, the first `num_full` in full."""

    deltas: bool  # it gets the best form of each bucket; once it refuses one, it gets all buckets in full
    num_best: int = 0
    num_full: int = 0

    def num_bytes(self, manifest: Manifest) -> int:
        return sum(manifest.best_bytes[: self.num_best]) + sum(manifest.full_bytes[: self.num_full])
