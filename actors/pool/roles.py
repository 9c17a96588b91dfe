"""The roles of the loop (`learner.roles`) over pools of replicas. Tokens stay where they were written: what passes
through here is references and a few numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from actors.pool.membership import Replica
from actors.pool.pool import Pool
from common.errors import CorruptWeightsError, RoleError, RolloutLostError
from common.types import Prompt, RolloutRef, Score, Void
from common.weights import PublishedBucket


class GeneratorPool:
    """`learner.roles.Generators`. A replica is routable only while it holds the version that is wanted."""

    def __init__(self, pool: Pool, *, response_tokens: int = 0) -> None:
        """`response_tokens`: the longest response, which counts as a prompt's share of the load beside its own."""
        self._pool = pool
        self._response_tokens = response_tokens
        self._wanted: int | None = None  # the learner's newest version; None: nothing came from it yet
        self._newest: list[Any] = []  # references of the wanted version's buckets, for those who come late
        pool.catch_up = self._catch_up
        pool.hand_over = lambda replica: replica.hand_over.remote()

    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        """Begins again where a replica dies; goes on where one hands over what it has."""
        cost = len(prompt.token_ids) + self._response_tokens
        begun: Any = None
        while True:
            ask = partial(_generate, prompt, begun, plain_tokens)
            try:
                rollout, written = await self._pool.call(f"answer prompt {prompt.sample_id}", ask, cost=cost)
            except RolloutLostError:  # with the node that had begun it
                begun = None
                continue
            if written.finished:
                return replace(written, rollout=rollout)
            begun = rollout

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return await self._pool.host.fetch(references)

    async def load(self, weights: AsyncIterable[PublishedBucket], version: int) -> dict[str, float]:
        """Every replica pulls and stages what is published while the learner packs more; once all is there, every
        replica swaps. Returns bytes sent, and the longest time that a replica's engine did not step."""
        parcels: list[PublishedBucket] = []
        deliveries: dict[int, WeightDelivery] = {}

        async def stage(replica: Replica) -> None:
            if (delivery := deliveries.get(replica.number)) is None:
                send = partial(self._stage, replica, version)
                delivery = deliveries[replica.number] = WeightDelivery(send, in_full=replica.version != self._wanted)
            await delivery.bring(parcels)

        async with aclosing(_as_they_come(weights)) as arrivals:
            async for arrived in arrivals:
                parcels.extend(arrived)
                arrived.clear()
                await self._pool.each(stage)
                # Whoever is to begin anew, or has just joined, needs buckets: changes leave the object store.
                parcels[:] = [replace(parcel, changes=None) for parcel in parcels]
        # From here on who joins takes these, and who holds another version gets no new work.
        self._newest, self._wanted = [parcel.full for parcel in parcels], version

        async def swap(replica: Replica) -> float:
            self._pool.suspend(replica)
            await stage(replica)  # one that has joined since gets all of it
            pause_s = await self._swap(replica, version)
            self._pool.resume(replica)
            return pause_s

        pauses = await self._pool.each(swap)
        return {
            "weights/bytes": sum(delivery.num_bytes for delivery in deliveries.values()),
            "weights/pause_s": max(pauses.values(), default=0.0),
        }

    async def _catch_up(self, replica: Replica) -> None:
        """The newest weights, taken directly; again if newer ones came meanwhile."""
        while (version := self._wanted) is not None and version != replica.version:
            await self._stage(replica, version, self._newest)
            await self._swap(replica, version)

    async def _stage(self, replica: Replica, version: int, parts: list[Any]) -> None:
        what = f"stage weights version {version}"
        await self._pool.ask(replica, what, lambda handle: handle.stage.remote(*parts))

    async def _swap(self, replica: Replica, version: int) -> float:
        """Returns for how long its engine did not step, seconds."""
        what = f"swap in weights version {version}"
        held, pause_s = await self._pool.ask(replica, what, lambda handle: handle.swap.remote(version))
        if held != version:
            raise RoleError(f"wanted weights version {version} on {replica.name}, but it holds {held}")
        replica.version = held
        return pause_s


class WeightDelivery:
    """One set of weights on its way to one replica: changes until it refuses some, then all of it in full."""

    def __init__(self, send: Callable[[list[Any]], Awaitable[None]], *, in_full: bool) -> None:
        self._send = send
        self._in_full = in_full
        self._brought = 0
        self.num_bytes = 0

    async def bring(self, parcels: Sequence[PublishedBucket]) -> None:
        """Has the replica stage those of all `parcels` so far that it lacks. Raises CorruptWeightsError if it refuses
        even the full set."""
        new = parcels[self._brought :]
        if not self._in_full:
            try:
                await self._stage(new)
            except CorruptWeightsError:
                self._in_full, new = True, parcels
        if self._in_full:
            await self._stage(new)
        self._brought = len(parcels)

    async def _stage(self, parcels: Sequence[PublishedBucket]) -> None:
        if not parcels:
            return
        parts = []
        for parcel in parcels:
            if self._in_full or parcel.changes is None or parcel.changes_bytes is None:
                parts.append(parcel.full)
                self.num_bytes += parcel.full_bytes
            else:
                parts.append(parcel.changes)
                self.num_bytes += parcel.changes_bytes
        await self._send(parts)


async def _generate(prompt: Prompt, begun: Any, plain_tokens: int, handle: Any) -> tuple[Any, RolloutRef]:
    """A reference to the rollout, and what the loop must know of it."""
    rollout, written = handle.generate.options(num_returns=2).remote(prompt, begun, plain_tokens)
    return rollout, await written


async def _measure(rollout: Any, handle: Any) -> tuple[Any, bool]:
    logprobs, finite = handle.logprobs.options(num_returns=2).remote(rollout)
    return logprobs, await finite


async def _as_they_come(source: AsyncIterable[Any]) -> AsyncGenerator[list[Any], None]:
    """All items that came since the last time, one at least: the source is read on while the caller is busy."""
    arrived: list[Any] = []
    changed = asyncio.Event()

    async def read() -> None:
        try:
            async for item in source:
                arrived.append(item)
                changed.set()
        finally:
            changed.set()

    reader = asyncio.create_task(read())
    try:
        while arrived or not reader.done():
            await changed.wait()
            changed.clear()
            if arrived:
                items = arrived.copy()
                arrived.clear()
                yield items
        await reader  # its error, if there was one
    finally:
        reader.cancel()


class RewardPool:
    """`learner.roles.Reward`."""

    def __init__(self, pool: Pool, keep: Callable[[Void], Void] = lambda void: void) -> None:
        """`keep` writes down what a void says of its error, and returns the void without it."""
        self._pool = pool
        self._keep = keep

    async def score(self, written: RolloutRef) -> Score | Void:
        result = await self._pool.call(
            f"score {written.sample_id}", lambda handle: handle.score.remote(written.rollout), cost=written.num_tokens
        )
        return self._keep(result) if isinstance(result, Void) else result

    async def judge(self, written: RolloutRef) -> Score | Void:
        result = await self._pool.call(
            f"judge {written.sample_id}", lambda handle: handle.judge.remote(written.rollout), cost=written.num_tokens
        )
        return self._keep(result) if isinstance(result, Void) else result


class ReferencePool:
    """`learner.roles.Reference`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def logprobs(self, written: RolloutRef) -> tuple[Any, bool]:
        return await self._pool.call(
            f"measure {written.sample_id}", partial(_measure, written.rollout), cost=written.num_tokens
        )
