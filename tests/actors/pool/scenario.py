"""A pool of replicas in this process, with all that happened to it, for the tests of pool and roles."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from actors.pool.pool import Pool
from actors.pool.replica import PoolEvent
from common.config.base import Replicated
from tests import virtual_clock
from tests.fakes import LocalHost


class Worker:
    def __init__(self, name: str) -> None:
        self.name = name

    async def ready(self) -> str:
        return self.name

    async def work(self, seconds: float = 0.0) -> str:
        await asyncio.sleep(seconds)
        return self.name

    async def fail(self, error: Exception) -> None:
        raise error


@dataclass
class Started:
    """A pool and its events."""

    host: LocalHost
    pool: Pool
    events: list[PoolEvent] = field(default_factory=list)

    @classmethod
    async def start(
        cls,
        room: int = 1 << 30,
        role: type = Worker,
        node_of: Callable[[int], str] | None = None,
        **settings: Any,
    ) -> Started:
        """`node_of`: the node of the handle with this index; by default each replica has its own."""
        host = LocalHost(role, room=room, node_of=node_of)
        events: list[PoolEvent] = []
        pool = Pool(host, Replicated(**settings), on_event=events.append)
        return cls(host, await pool.start(timeout_s=5), events)

    def told(self, event: str) -> list[str]:
        """Names of the replicas with this event."""
        return [e.replica for e in self.events if e.event == event]

    async def work(self, seconds: float = 0.0, **options: Any) -> str:
        return await self.pool.call("work", lambda handle: handle.work.remote(seconds), **options)

    async def fail(self, error: Exception) -> None:
        await self.pool.call("fail", lambda handle: handle.fail.remote(error))


async def until(condition: Callable[[], Any], *, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Waits take no time, and last exactly as long as is asked for."""
    virtual_clock.run(asyncio.wait_for(scenario(), 30))
