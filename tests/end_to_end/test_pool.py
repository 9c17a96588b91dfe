"""The pool on real Ray, with a role that does as it is told."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from actors.engine import EngineDeadError
from actors.pool import Pool, RoleError
from common.config import RayConfig, Replicated
from deploy.cluster import cluster

pytestmark = pytest.mark.ray


class Worker:
    def __init__(self, name: str) -> None:
        self._name = name

    async def ready(self) -> str:
        return self._name

    async def who(self) -> str:
        return self._name

    async def pid(self) -> int:
        return os.getpid()

    async def sleep(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return self._name

    async def fail(self, error: Exception) -> None:
        raise error


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster(RayConfig(object_store_mib=128, dashboard=False)) as nodes:
        yield nodes


async def start(replicas: int, *, losses: list[str] | None = None, **settings) -> Pool:
    cfg = Replicated(replicas=replicas, **settings)
    lost = losses if losses is not None else []
    return await Pool.start(Worker, cfg, startup_timeout_s=60, on_loss=lambda name, error: lost.append(name))


def test_a_cluster_started_here_listens_on_loopback_only(ray_cluster):
    assert [node.name for node in ray_cluster] == ["127.0.0.1"]


def test_calls_go_to_the_least_loaded_replica(ray_cluster):
    async def scenario():
        pool = await start(2)
        long = asyncio.create_task(pool.call("sleep", lambda replica: replica.sleep.remote(2.0), cost=100))
        await asyncio.sleep(0.2)
        names = {await pool.call("say who", lambda replica: replica.who.remote()) for _ in range(5)}
        busy = await long
        assert names == {"Worker(0)", "Worker(1)"} - {busy}

    asyncio.run(scenario())


def test_a_killed_replica_is_left_out_and_its_calls_are_answered_by_another(ray_cluster):
    async def scenario():
        losses: list[str] = []
        pool = await start(2, losses=losses)
        pids = await pool.broadcast("tell pid", lambda replica: replica.pid.remote())
        calls = [asyncio.create_task(pool.call("sleep", lambda r: r.sleep.remote(1.0))) for _ in range(4)]
        await asyncio.sleep(0.3)
        os.kill(pids["Worker(0)"], signal.SIGKILL)
        assert await asyncio.gather(*calls) == ["Worker(1)"] * 4
        assert await pool.broadcast("say who", lambda replica: replica.who.remote()) == {"Worker(1)": "Worker(1)"}
        assert losses == ["Worker(0)"]
        os.kill(pids["Worker(1)"], signal.SIGKILL)
        with pytest.raises(RoleError, match="say who: no Worker replica is left"):
            await pool.call("say who", lambda replica: replica.who.remote())

    asyncio.run(scenario())


def test_a_dead_engine_counts_as_a_dead_replica(ray_cluster):
    async def scenario():
        pool = await start(1)
        with pytest.raises(RoleError, match="broken step"):
            await pool.call("fail", lambda replica: replica.fail.remote(EngineDeadError("broken step")))

    asyncio.run(scenario())


def test_a_roles_own_error_reaches_the_caller_and_costs_no_replica(ray_cluster):
    async def scenario():
        pool = await start(1)
        with pytest.raises(ValueError, match="my mistake"):
            await pool.call("fail", lambda replica: replica.fail.remote(ValueError("my mistake")))
        assert await pool.call("say who", lambda replica: replica.who.remote()) == "Worker(0)"

    asyncio.run(scenario())


def test_a_call_that_takes_too_long_names_replica_task_and_limit(ray_cluster):
    async def scenario():
        pool = await start(1, timeout_s=0.5)
        started = time.monotonic()
        with pytest.raises(RoleError, match=r"Worker\(0\) did not finish to sleep within 0.5 s"):
            await pool.call("sleep", lambda replica: replica.sleep.remote(60))
        assert time.monotonic() - started < 30

    asyncio.run(scenario())


def test_calls_beyond_in_flight_wait_here_and_their_time_does_not_run(ray_cluster):
    async def scenario():
        pool = await start(1, in_flight=1, timeout_s=2)
        # Four calls of 0.8 s one after the other: the last is answered after 3.2 s, each within its 2 s.
        return await asyncio.gather(*(pool.call("sleep", lambda r: r.sleep.remote(0.8)) for _ in range(4)))

    assert asyncio.run(scenario()) == ["Worker(0)"] * 4


def test_a_call_that_kills_replica_after_replica_is_given_up(ray_cluster):
    async def scenario():
        pool = await start(3)
        with pytest.raises(RoleError, match="fail: 2 Worker replicas died over it"):
            await pool.call("fail", lambda replica: replica.fail.remote(EngineDeadError("broken step")))
        assert len(pool) == 1

    asyncio.run(scenario())
