"""Replicas of a role behind one async method: least-loaded choice, retry elsewhere when one dies, a limit on waiting.

The roles themselves are plain classes; here they become Ray actors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from actors.engine import EngineDeadError
from actors.hosting import actor
from common.config import Replicated
from common.types import Prompt, Rollout, Score, Void
from common.weights import CorruptWeightsError, Parcel

Call = Callable[[Any], Awaitable[Any]]  # given a replica's handle, starts the remote call
OnLoss = Callable[[str, BaseException], None]  # told which replica left, and of what

# One request that takes this many replicas with it is the cause, not the victim.
MAX_LOSSES_PER_CALL = 2


class RoleError(RuntimeError):
    """A role cannot do its work any more; the message names role, replica and what was asked."""


class Pool:
    """The replicas of one role. A replica that dies leaves the routing table at once and its calls go elsewhere.

    At most `in_flight` calls are with a replica at a time; the others wait here, where no time limit runs.
    """

    def __init__(
        self, role: str, replicas: Mapping[str, Any], *, in_flight: int, timeout_s: float, on_loss: OnLoss
    ) -> None:
        self._role = role
        self._replicas = dict(replicas)
        self._calls = dict.fromkeys(replicas, 0)  # with each replica now
        self._load = dict.fromkeys(replicas, 0)  # their cost
        self._in_flight = in_flight
        self._timeout_s = timeout_s
        self._on_loss = on_loss
        self._changed = asyncio.Condition()
        self._last_error: BaseException | None = None

    @classmethod
    async def start(
        cls, role: type, cfg: Replicated, *args: Any, startup_timeout_s: float, on_loss: OnLoss, **kwargs: Any
    ) -> Pool:
        """`cfg.replicas` actors `role(name, *args, **kwargs)`, named like Generator(0). Returns when all are ready."""
        create = actor(role, cfg)
        names = [f"{role.__name__}({index})" for index in range(cfg.replicas)]
        replicas = {name: create.remote(name, *args, **kwargs) for name in names}
        pool = cls(role.__name__, replicas, in_flight=cfg.in_flight, timeout_s=startup_timeout_s, on_loss=on_loss)
        await pool.broadcast("start", lambda replica: replica.ready.remote())
        pool._timeout_s = cfg.timeout_s
        return pool

    def __len__(self) -> int:
        return len(self._replicas)

    def stop(self) -> None:
        """Ends every replica, and frees what it reserved."""
        for replica in self._replicas.values():
            ray.kill(replica)
        self._replicas.clear()

    async def call(self, what: str, call: Call, *, cost: int = 1) -> Any:
        """The answer of the least loaded replica. Raises RoleError when it takes too long or no replica is left."""
        for _ in range(MAX_LOSSES_PER_CALL):
            name, replica = await self._acquire(what, cost)
            try:
                return await self._ask(name, replica, what, call)
            except (RayActorError, EngineDeadError) as error:
                self._lose(name, error)
            finally:
                await self._release(name, cost)
        if not self._replicas:
            raise self._none_left(what)
        raise RoleError(f"{what}: {MAX_LOSSES_PER_CALL} {self._role} replicas died over it: {self._last_error}")

    async def broadcast(self, what: str, call: Call) -> dict[str, Any]:
        """The answer of every replica. One that dies over it leaves the pool; raises RoleError if none is left."""
        asked = dict(self._replicas)
        answers = await asyncio.gather(
            *(self._ask(name, replica, what, call) for name, replica in asked.items()), return_exceptions=True
        )
        for name, answer in zip(asked, answers, strict=True):
            if isinstance(answer, (RayActorError, EngineDeadError)):
                self._lose(name, answer)
            elif isinstance(answer, BaseException):
                raise answer
        if not self._replicas:
            raise self._none_left(what)
        return {name: answer for name, answer in zip(asked, answers, strict=True) if name in self._replicas}

    async def _acquire(self, what: str, cost: int) -> tuple[str, Any]:
        """The least loaded replica, once one has room for another call."""

        def with_room() -> list[str]:
            return [name for name in self._replicas if self._calls[name] < self._in_flight]

        async with self._changed:
            await self._changed.wait_for(lambda: with_room() or not self._replicas)
            if not self._replicas:
                raise self._none_left(what)
            name = min(with_room(), key=lambda name: self._load[name])
            self._calls[name] += 1
            self._load[name] += cost
            return name, self._replicas[name]

    async def _release(self, name: str, cost: int) -> None:
        async with self._changed:
            self._calls[name] -= 1
            self._load[name] -= cost
            self._changed.notify_all()

    async def _ask(self, name: str, replica: Any, what: str, call: Call) -> Any:
        try:
            return await asyncio.wait_for(call(replica), self._timeout_s)
        except TimeoutError as error:
            raise RoleError(f"{name} did not finish to {what} within {self._timeout_s:g} s") from error

    def _lose(self, name: str, error: BaseException) -> None:
        if replica := self._replicas.pop(name, None):
            self._last_error = error
            ray.kill(replica)  # an engine may be dead in a process that lives
            self._on_loss(name, error)

    def _none_left(self, what: str) -> RoleError:
        return RoleError(f"{what}: no {self._role} replica is left; the last one died of: {self._last_error}")


class GeneratorPool:
    """`learner.roles.Generators` on Ray."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._up_to_date: set[Any] = set()  # replicas that hold the version loaded last: what changes are made from

    async def generate(self, prompt: Prompt) -> Rollout:
        return await self._pool.call(
            f"answer prompt {prompt.sample_id}",
            lambda replica: replica.generate.remote(prompt),
            cost=len(prompt.token_ids),
        )

    async def load(self, weights: AsyncIterable[Parcel], version: int) -> dict[str, float]:
        """Every replica pulls and stages what is published while the learner packs more; once all is there, every
        replica swaps. Returns bytes sent, and the longest time that a replica's engine did not step."""
        parcels: list[Parcel] = []
        deliveries: dict[Any, Delivery] = {}

        async def stage(replica: Any) -> None:
            if replica not in deliveries:
                deliveries[replica] = Delivery(replica, in_full=replica not in self._up_to_date)
            await deliveries[replica].bring(parcels)

        async def swap(replica: Any) -> tuple[int, float]:
            await stage(replica)  # a replica that has joined since gets all of it
            return await replica.swap.remote(version)

        async with aclosing(_as_they_come(weights)) as arrivals:
            async for arrived in arrivals:
                parcels.extend(arrived)
                await self._pool.broadcast(f"stage weights version {version}", stage)
                # Whoever is to begin anew, or has just joined, needs buckets: changes leave the object store.
                parcels[:] = [replace(parcel, changes=None) for parcel in parcels]
        swapped = await self._pool.broadcast(f"swap in weights version {version}", swap)
        if wrong := {name: held for name, (held, _) in swapped.items() if held != version}:
            raise RoleError(f"wanted weights version {version} on every generator, but {wrong}")
        self._up_to_date = set(deliveries)
        return {
            "weights/bytes": sum(delivery.num_bytes for delivery in deliveries.values()),
            "weights/pause_s": max(pause_s for _, pause_s in swapped.values()),
        }


class Delivery:
    """One set of weights on its way to one replica: changes until it refuses some, then all of it in full."""

    def __init__(self, replica: Any, *, in_full: bool) -> None:
        self._replica = replica
        self._in_full = in_full
        self._brought = 0
        self.num_bytes = 0

    async def bring(self, parcels: Sequence[Parcel]) -> None:
        """Has the replica stage those of all `parcels` so far that it lacks. Raises CorruptWeightsError if it refuses
        even the full set."""
        new = parcels[self._brought :]
        if not self._in_full:
            try:
                await self._send(new)
            except CorruptWeightsError:
                self._in_full, new = True, parcels
        if self._in_full:
            await self._send(new)
        self._brought = len(parcels)

    async def _send(self, parcels: Sequence[Parcel]) -> None:
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
        await self._replica.stage.remote(*parts)


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
    """`learner.roles.Reward` on Ray."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def score(self, rollout: Rollout) -> Score | Void:
        return await self._pool.call(
            f"score {rollout.prompt.sample_id}", lambda replica: replica.score.remote(rollout), cost=rollout.num_tokens
        )

    async def judge(self, rollout: Rollout) -> Score | Void:
        return await self._pool.call(
            f"judge {rollout.prompt.sample_id}", lambda replica: replica.judge.remote(rollout), cost=rollout.num_tokens
        )


class ReferencePool:
    """`learner.roles.Reference` on Ray."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def logprobs(self, rollout: Rollout) -> np.ndarray:
        return await self._pool.call(
            f"measure {rollout.prompt.sample_id}",
            lambda replica: replica.logprobs.remote(rollout),
            cost=rollout.num_tokens,
        )
