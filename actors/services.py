"""The roles of the loop (`learner.roles`) over pools of replicas. Tokens stay where they were written: what passes
through here is references and a few numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from actors.pool import Pool, Replica, RoleError
from common.types import Prompt, RolloutLostError, Score, Void, Written


class GeneratorPool:
    """`learner.roles.Generators`. A replica is routable only while it holds the version that is wanted."""

    def __init__(self, pool: Pool, *, response_tokens: int = 0) -> None:
        """`response_tokens`: the longest response, which counts as a prompt's share of the load beside its own."""
        self._pool = pool
        self._response_tokens = response_tokens
        self._wanted = 0  # the version from disk
        self._newest: list[Any] = []  # references of the wanted version's buckets, for those who come late
        self._held: dict[int, int] = {}  # replica -> version it has verified
        pool.catch_up = self._catch_up
        pool.hand_over = lambda replica: replica.hand_over.remote()

    async def generate(self, prompt: Prompt) -> Written:
        """Begins again where a replica dies; goes on where one hands over what it has."""
        cost = len(prompt.token_ids) + self._response_tokens
        begun: Any = None
        while True:
            ask = partial(_generate, prompt=prompt, begun=begun)
            try:
                rollout, written = await self._pool.call(f"answer prompt {prompt.sample_id}", ask, cost=cost)
            except RolloutLostError:  # with the node that had begun it
                begun = None
                continue
            if written.finished:
                return replace(written, rollout=rollout)
            begun = rollout

    async def fetch(self, reference: Any) -> Any:
        return await self._pool.host.fetch(reference)

    async def load(self, weights: AsyncIterable[Any], version: int) -> None:
        """`weights` are object references of Buckets: every replica pulls and stages them while the learner packs
        more; once all are there, every replica swaps."""
        newest: list[Any] = []
        staging: set[Replica] = set(self._pool.ready)

        async def stage(replica: Replica, buckets: list[Any]) -> None:
            if replica in staging:
                await self._stage(replica, version, buckets)

        async with aclosing(_as_they_come(weights)) as arrivals:
            async for buckets in arrivals:
                newest += buckets
                await self._pool.each(partial(stage, buckets=buckets))
        # From here on who joins takes these, and who holds another version gets no new work.
        self._newest, self._wanted = newest, version

        async def swap(replica: Replica) -> None:
            self._pool.suspend(replica)
            if replica not in staging:  # it joined in between
                await self._stage(replica, version, newest)
            await self._swap(replica, version)
            self._pool.resume(replica)

        await self._pool.each(swap)

    async def _catch_up(self, replica: Replica) -> None:
        """The newest weights, taken directly; again if newer ones came meanwhile."""
        while (version := self._wanted) != self._held.get(replica.number, 0):
            await self._stage(replica, version, self._newest)
            await self._swap(replica, version)

    async def _stage(self, replica: Replica, version: int, buckets: list[Any]) -> None:
        what = f"stage weights version {version}"
        await self._pool.ask(replica, what, lambda handle: handle.stage.remote(*buckets))

    async def _swap(self, replica: Replica, version: int) -> None:
        what = f"swap in weights version {version}"
        held = await self._pool.ask(replica, what, lambda handle: handle.swap.remote(version))
        if held != version:
            raise RoleError(f"wanted weights version {version} on {replica.name}, but it holds {held}")
        self._held[replica.number] = held


async def _generate(handle: Any, prompt: Prompt, begun: Any) -> tuple[Any, Written]:
    """A reference to the rollout, and what the loop must know of it."""
    rollout, written = handle.generate.options(num_returns=2).remote(prompt, begun)
    return rollout, await written


async def _measure(handle: Any, rollout: Any) -> tuple[Any, bool]:
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

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def score(self, written: Written) -> Score | Void:
        return await self._pool.call(
            f"score {written.sample_id}", lambda handle: handle.score.remote(written.rollout), cost=written.num_tokens
        )

    async def judge(self, written: Written) -> Score | Void:
        return await self._pool.call(
            f"judge {written.sample_id}", lambda handle: handle.judge.remote(written.rollout), cost=written.num_tokens
        )


class ReferencePool:
    """`learner.roles.Reference`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def logprobs(self, written: Written) -> tuple[Any, bool]:
        return await self._pool.call(
            f"measure {written.sample_id}", partial(_measure, rollout=written.rollout), cost=written.num_tokens
        )
