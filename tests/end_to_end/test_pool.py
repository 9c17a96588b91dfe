"""The pool on real Ray, with a role that does as it is told. What needs no Ray is in tests/actors/pool/test_pool.py."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from ray._private.internal_api import memory_summary

from actors.pool.pool import Pool
from actors.pool.replica import PoolEvent
from common.config.base import Replicated
from common.errors import EngineDeadError, RoleError
from tests.ray_pools import start_pool

pytestmark = pytest.mark.ray


class Worker:
    def __init__(self, name: str) -> None:
        self._name = name
        self._released = asyncio.Event()

    def __repr__(self) -> str:
        return self._name

    async def ready(self) -> str:
        return self._name

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self) -> str:
        await self._released.wait()
        return self._name

    async def release(self) -> None:
        self._released.set()

    async def block(self, seconds: float) -> str:
        time.sleep(seconds)
        return self._name

    async def fail(self, error: Exception) -> None:
        raise error

    async def write(self, tokens: int) -> tuple[np.ndarray, int]:
        return np.arange(tokens, dtype=np.int32), tokens

    async def add_up(self, written: np.ndarray) -> int:
        return int(written.sum())


class Opening(Worker):
    """Has a file that says whether it was closed."""

    CLOSE_S = 10.0

    async def open(self, file: Path) -> None:
        self._file = file
        file.write_text("open")

    async def close_all(self) -> None:
        await asyncio.sleep(0.2)
        self._file.write_text("closed")


class Broken(Worker):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        raise ValueError("no such model")


def run(scenario, *, role: type = Worker, **settings) -> list[PoolEvent]:
    """`scenario(pool, events)` with a pool around it; returns the events."""
    events: list[PoolEvent] = []

    async def whole():
        pool = await start_pool(role, Replicated(**settings), startup_timeout_s=240, on_event=events.append)
        try:
            await scenario(pool, events)
        finally:
            pool.stop()

    asyncio.run(asyncio.wait_for(whole(), 400))
    return events


async def pids(pool: Pool) -> dict[str, int]:
    return await pool.each(lambda replica: replica.handle.pid.remote())


def calls(pool: Pool) -> list[int]:
    """The number of calls in flight on each ready replica."""
    return [pool._router.calls(replica.number) for replica in pool.ready]


def test_a_cluster_started_here_listens_on_loopback_only(ray_cluster):
    assert [node.name for node in ray_cluster] == ["127.0.0.1"]


def test_another_process_answers_the_calls_of_a_killed_one(ray_cluster):
    async def scenario(pool, events):
        killed = await pids(pool)
        held = [asyncio.create_task(pool.call("hold", lambda handle: handle.hold.remote())) for _ in range(4)]
        while calls(pool) != [2, 2]:
            await asyncio.sleep(0.05)
        [other] = [replica for replica in pool.ready if replica.name == "Worker(1)"]
        os.kill(killed["Worker(0)"], signal.SIGKILL)
        await other.handle.release.remote()
        assert await asyncio.gather(*held) == ["Worker(1)"] * 4
        while len(pool.ready) < 2:
            await asyncio.sleep(0.1)
        assert set(await pids(pool)) == {"Worker(0)", "Worker(1)"}
        assert (await pids(pool))["Worker(0)"] != killed["Worker(0)"]

    events = run(scenario, min=2)
    assert sorted(event.event for event in events) == ["died", "joined", "joined", "joined"]
    assert [event.calls for event in events if event.event == "died"] == [2]


def test_a_stopped_process_is_replaced_and_a_busy_one_is_not(ray_cluster):
    async def scenario(pool, events):
        stopped = await pids(pool)
        busy = asyncio.create_task(pool.call("block", lambda handle: handle.block.remote(8.0)))
        while not any(calls(pool)):
            await asyncio.sleep(0.05)
        [taken] = [replica for replica in pool.ready if pool._router.calls(replica.number)]
        [idle] = [replica for replica in pool.ready if replica is not taken]
        os.kill(stopped[idle.name], signal.SIGSTOP)
        assert await busy == taken.name
        while not any(event.event == "died" for event in events):
            await asyncio.sleep(0.1)
        while len(pool.ready) < 2:
            await asyncio.sleep(0.1)

    events = run(scenario, min=2, probe_timeout_s=3)
    [died] = [event for event in events if event.event == "died"]
    assert "answered no health probe for 3 s" in died.reason


def test_a_dead_engine_is_a_dead_replica_and_other_errors_are_not(ray_cluster):
    async def scenario(pool, events):
        with pytest.raises(ValueError, match="my mistake"):
            await pool.call("fail", lambda handle: handle.fail.remote(ValueError("my mistake")))
        assert len(pool.ready) == 2
        [name] = [replica.name for replica in pool.ready[:1]]
        with pytest.raises(EngineDeadError):
            await pool.ready[0].handle.fail.remote(EngineDeadError("broken step"))
        failed = []

        async def fail_once(handle):
            if not failed:
                failed.append(handle)
                return await handle.fail.remote(EngineDeadError("broken step"))
            return await handle.ready.remote()

        assert await pool.call("fail once", fail_once) != name
        while not any(event.event == "died" for event in events):
            await asyncio.sleep(0.05)

    events = run(scenario, min=2)
    assert ["broken step" in event.reason for event in events if event.event == "died"] == [True]


def test_a_role_that_cannot_start_is_an_error_with_its_reason(ray_cluster):
    with pytest.raises(RoleError, match=r"start: Broken\(0\) died: .*no such model"):
        run(None, role=Broken)


def stored() -> str:
    """What this cluster's object store holds. Without the address Ray would ask any cluster of the machine."""
    return memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)


async def write(handle, tokens: int):
    reference, number = handle.write.options(num_returns=2).remote(tokens)
    return reference, await number


def test_a_large_result_stays_on_its_node_and_travels_by_reference(ray_cluster):
    """64 tokens and more are more than may come along with an answer."""

    async def scenario(pool, events):
        assert "Plasma memory usage 0 MiB, 0 objects" in stored()
        reference, number = await pool.call("write", partial(write, tokens=256))
        assert isinstance(reference, ray.ObjectRef)
        assert number == 256
        assert "1 objects" in stored()  # in shared memory, not in the caller
        assert await pool.call("add up", lambda handle: handle.add_up.remote(reference)) == 255 * 256 // 2
        os.kill((await pids(pool))["Worker(0)"], signal.SIGKILL)
        [written] = await pool.host.fetch([reference])
        assert written.tolist() == list(range(256))  # it outlives the process that wrote it

    run(scenario)


def test_a_process_closes_what_it_has_open_before_the_pool_ends_it(ray_cluster, tmp_path):
    async def scenario(pool, events):
        await pool.call("open", lambda handle: handle.open.remote(tmp_path / "file"))

    run(scenario, role=Opening)
    assert (tmp_path / "file").read_text() == "closed"
