"""Replicas as Ray actors: where a pool finds, starts and loses them."""

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
from common.errors import RolloutLostError


class RayHost:
    """`actors.pool.membership.Host` for replicas `role(name, *args, **kwargs)` that are Ray actors."""

    losses: tuple[type[BaseException], ...] = (RayActorError,)
    lost_values: tuple[type[BaseException], ...] = (ObjectLostError,)
    outages: type[BaseException] = Exception  # Ray's directory has no error of its own for being away

    def __init__(self, role: type, cfg: Placed, *args: Any, **kwargs: Any) -> None:
        # A concurrency group of its own is a thread of its own: probes are answered however busy the others are.
        self._actor = actor(role, cfg, concurrency_groups={"health": 1})
        self._args, self._kwargs = args, kwargs
        self._numbers = itertools.count()

    def create(self, name: str) -> Any:
        # In Ray a name is free again only some time after its actor's death: it gets a number that never was.
        unique = f"{name} #{next(self._numbers)}"
        return self._actor.options(name=unique).remote(name, *self._args, **self._kwargs)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)

    async def node(self, handle: Any) -> str | None:
        # Ray's own table, which has no public form: the process id is there once the actor has found room.
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
        return [_there(next(fetched)) if isinstance(ref, ray.ObjectRef) else ref for ref in references]


def _there(fetched: Any) -> Any:
    """The value, or in its place the RolloutLostError; other errors are raised."""
    if isinstance(fetched, ObjectLostError):
        lost = RolloutLostError("its tokens were lost with the node they lay on")
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
    """Replicas `role(name, *args, **kwargs)`, named like Generator(0); returns when `cfg.min` of them are ready."""
    pool = Pool(role.__name__, RayHost(role, cfg, *args, **kwargs), cfg, on_event=on_event)
    return await pool.start(startup_timeout_s)
