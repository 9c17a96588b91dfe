"""The start of pools: what a user hears while it waits for nodes."""

from __future__ import annotations

import asyncio
import time

import pytest

from actors.pool.pool import Pool
from common import node_waits
from common.config.base import RayConfig, Replicated
from deploy.starting import Starter
from tests.fakes import LocalHost


class Worker:
    """A role that is ready at once."""

    def __init__(self, name):
        self.name = name

    async def ready(self):
        return True


def test_a_start_says_which_replicas_wait_for_a_node_and_for_how_long(monkeypatch):
    monkeypatch.setattr(node_waits, "TELL_AFTER_S", 1.0)
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(node_waits, "TELL_EVERY_S", 0.5)
    told = []

    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=60), lambda event: None, told.append)
        host = LocalHost(Worker, room=1)
        cfg = Replicated(min=3, cpus=4, labels={"group": "generators"})
        starting = asyncio.create_task(starter.start(Pool(host, cfg), cfg))
        while len(told) < 3 and not starting.done():
            await asyncio.sleep(0.01)
        host.make_room(3)
        pool = await starting
        assert starter.pools == [pool]
        heard = len(told)
        await asyncio.sleep(0.6)
        starter.stop()
        assert len(told) == heard  # the start is over

    asyncio.run(scenario())
    asked = "each asks for 4 CPUs and a node with the labels group=generators"
    limit = f"({asked}; at most 60 s, ray.startup_timeout_s)"
    assert told[0] == f"Worker(1), Worker(2) wait for a node with room: 1 s so far {limit}"
    assert told[2].startswith("Worker(1), Worker(2) wait for a node with room: 2 s so far")


def test_a_start_with_room_says_nothing_and_extra_replicas_may_wait(monkeypatch):
    monkeypatch.setattr(node_waits, "TELL_AFTER_S", 0.3)
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.01)
    told = []

    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=60), lambda event: None, told.append)
        cfg = Replicated(min=1, max=2)
        pool = await starter.start(Pool(LocalHost(Worker, room=1), cfg), cfg)
        while len(pool.members.replicas) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.6)
        assert [replica.state for replica in pool.members.replicas] == ["ready", "pending"]
        assert pool.members.waiting == []
        starter.stop()

    asyncio.run(scenario())
    assert told == []


@pytest.mark.parametrize(("autoscaler", "patience_s"), [(False, 0), (True, 30)])
def test_pools_and_ranks_of_a_run_have_one_order(autoscaler, patience_s, monkeypatch):
    starter = Starter(RayConfig(startup_timeout_s=60, autoscaler=autoscaler), lambda event: None)
    shared = starter.for_ranks()["precedence"]
    shared.wait("learner")
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + 40)
    assert shared.waited_s == pytest.approx(40 - patience_s, abs=1)
    monkeypatch.undo()

    async def scenario():
        cfg = Replicated(min=1, max=2)
        pool = await starter.start(Pool(LocalHost(Worker), cfg), cfg)
        await asyncio.sleep(0.7)
        assert len(pool.members.replicas) == (2 if autoscaler else 1)  # without one, the extra replica is held back
        starter.stop()

    asyncio.run(scenario())
