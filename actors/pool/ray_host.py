"""Replicas as Ray actors: how a pool starts, watches and kills them. Runs in the driver."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray._private import state as ray_state
from ray.exceptions import ObjectLostError, RayActorError, RayError

from actors.pool.ray_actor import actor
from common.config.base import Pooled
from common.daemon_threads import answer, in_daemon_thread
from common.errors import EngineDeadError, RolloutLostError

# Longest wait for an answer of Ray's directory, seconds. It usually takes a millisecond.
DIRECTORY_S = 5.0


class RayHost:
    """A `Host` whose replicas `role(name, *args, **kwargs)` are Ray actors.

    Ray's directory (its GCS) takes part in creating, finding and killing actors. These calls block, and never return
    if the directory is frozen, so each has a daemon thread. Calls to actors that run do not need the directory.
    """

    losses: tuple[type[BaseException], ...] = (RayActorError, EngineDeadError)
    lost_values: tuple[type[BaseException], ...] = (ObjectLostError,)
    outages: tuple[type[BaseException], ...] = (TimeoutError, RayError)

    def __init__(self, role: type, cfg: Pooled, *args: Any, **kwargs: Any) -> None:
        inspect.signature(role).bind("name", *args, **kwargs)  # a wrong argument fails here, and not in every replica
        self.role = role.__name__
        self._actor = actor(role, cfg)
        self._args, self._kwargs = args, kwargs
        self._timeout_s = cfg.timeout_s
        self.close_s: float = getattr(role, "CLOSE_S", 0.0)
        self._numbers = itertools.count()
        self._asked: dict[str, Future[Any]] = {}  # questions to the directory that are not answered yet

    async def create(self, name: str) -> Any:
        # Ray frees the name of a dead actor only after some time, so every name gets a new number.
        named = self._actor.options(name=f"{name} #{next(self._numbers)}")
        return await answer(in_daemon_thread(partial(named.remote, name, *self._args, **self._kwargs)))

    def kill(self, handle: Any, *, close: bool) -> Future[None]:
        return in_daemon_thread(self._kill, handle, close and self.close_s > 0)

    def _kill(self, handle: Any, close: bool) -> None:
        if close:
            with suppress(Exception):  # it has died, or does not answer
                ray.get(handle.close_all.remote(), timeout=self.close_s)
        ray.kill(handle)

    async def node(self, handle: Any) -> str | None:
        # Ray's own table of actors, which has no public API. A process id in it means that the actor has found room.
        actor_id = handle._actor_id.hex()
        entry = await self._ask(actor_id, partial(ray_state.actors, actor_id))
        return entry["Address"]["NodeID"] if entry and entry["Pid"] else None

    async def leaving_nodes(self) -> Mapping[str, float]:
        # Ray Train watches for preemption through the same private call.
        deadlines_ms = await self._ask("draining nodes", ray_state.state.get_draining_nodes)
        return {node: ms / 1000 - time.time() if ms else float("inf") for node, ms in deadlines_ms.items()}

    async def _ask(self, question: str, function: Callable[[], Any]) -> Any:
        """The directory's answer. If an earlier call with the same question has no answer yet, this waits for that
        call's answer. Otherwise a frozen directory would get a new thread every half second."""
        if (asked := self._asked.get(question)) is None:
            asked = self._asked[question] = in_daemon_thread(function)
            asked.add_done_callback(lambda done: self._asked.pop(question, None))
        return await answer(asked, within_s=DIRECTORY_S)

    def probe(self, handle: Any) -> Awaitable[Any]:
        return handle.ready.options(concurrency_group="health").remote()

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        awaited = [ref.as_future() for ref in references if isinstance(ref, ray.ObjectRef)]
        if awaited:
            await asyncio.wait(awaited, timeout=self._timeout_s)
        fetched = iter(awaited)
        return [self._value_or_lost(next(fetched)) if isinstance(ref, ray.ObjectRef) else ref for ref in references]

    def _value_or_lost(self, fetched: asyncio.Future[Any]) -> Any:
        """The value, or the RolloutLostError that takes its place. Other errors are raised."""
        if not fetched.done():
            return RolloutLostError(f"its tokens did not arrive within {self._timeout_s:g} s (timeout_s)")
        if isinstance(error := fetched.exception(), ObjectLostError):
            lost = RolloutLostError("its tokens were lost with the node that held them")
            lost.__cause__ = error
            return lost
        return fetched.result()
