"""Replicas as Ray actors: how a pool starts, watches and kills them. Runs in the driver."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import ray
from ray._private import state as ray_state
from ray.exceptions import ObjectLostError, RayActorError

from actors.pool.membership import OnEvent
from actors.pool.pool import Pool
from actors.pool.ray_actor import actor
from common.config.base import Placed, Replicated
from common.errors import EngineDeadError, RolloutLostError


class RayHost:
    """A `Host` whose replicas `role(name, *args, **kwargs)` are Ray actors."""

    losses: tuple[type[BaseException], ...] = (RayActorError, EngineDeadError)
    lost_values: tuple[type[BaseException], ...] = (ObjectLostError,)
    outages: type[BaseException] = Exception  # Ray has no error of its own for an unreachable directory

    def __init__(self, role: type, cfg: Placed, *args: Any, **kwargs: Any) -> None:
        self.role = role.__name__
        # A concurrency group has its own thread, so probes are answered while all other threads are busy.
        self._actor = actor(role, cfg, concurrency_groups={"health": 1})
        self._args, self._kwargs = args, kwargs
        self._numbers = itertools.count()

    def create(self, name: str) -> Any:
        # Ray frees the name of a dead actor only after some time, so every name gets a new number.
        unique = f"{name} #{next(self._numbers)}"
        return self._actor.options(name=unique).remote(name, *self._args, **self._kwargs)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)

    async def node(self, handle: Any) -> str | None:
        # Ray's own table of actors, which has no public API. A process id in it means that the actor has found room.
        entry = await asyncio.to_thread(ray_state.actors, handle._actor_id.hex())
        return entry["Address"]["NodeID"] if entry and entry["Pid"] else None

    async def leaving_nodes(self) -> Mapping[str, float]:
        # Ray Train watches for preemption through the same private call.
        deadlines_ms = await asyncio.to_thread(ray_state.state.get_draining_nodes)
        return {node: ms / 1000 - time.time() if ms else float("inf") for node, ms in deadlines_ms.items()}

    def probe(self, handle: Any) -> Awaitable[Any]:
        return handle.ready.options(concurrency_group="health").remote()

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        awaited = [ref.as_future() for ref in references if isinstance(ref, ray.ObjectRef)]
        fetched = iter(await asyncio.gather(*awaited, return_exceptions=True))
        return [_value_or_lost(next(fetched)) if isinstance(ref, ray.ObjectRef) else ref for ref in references]


def _value_or_lost(fetched: Any) -> Any:
    """The value, or the RolloutLostError that takes its place. Other errors are raised."""
    if isinstance(fetched, ObjectLostError):
        lost = RolloutLostError("its tokens were lost with the node that held them")
        lost.__cause__ = fetched
        return lost
    if isinstance(fetched, BaseException):
        raise fetched
    return fetched


async def start_pool(
    role: type,
    cfg: Replicated,
    *args: Any,
    startup_timeout_s: float,
    on_event: OnEvent = lambda event: None,
    **kwargs: Any,
) -> Pool:
    """A pool of replicas `role(name, *args, **kwargs)`, named like Reward(0); returns when `cfg.min` are ready."""
    return await Pool(RayHost(role, cfg, *args, **kwargs), cfg, on_event=on_event).start(startup_timeout_s)
