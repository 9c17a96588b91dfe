"""The start of pools: what a user hears while it waits for nodes."""

from __future__ import annotations

import asyncio

import pytest

from actors.pool.pool import Pool
from common import node_waits
from common.config.base import Placed, RayConfig, Replicated
from deploy.starting import Starter
from tests import virtual_clock
from tests.fakes import LocalHost


class Worker:
    """A role that is ready at once."""

    def __init__(self, name):
        self.name = name

    async def ready(self):
        return True


class Other(Worker):
    """Another role."""


def test_a_start_says_which_replicas_wait_for_a_node_and_for_how_long(monkeypatch):
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.1)
    told = []

    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=300), lambda event: None, told.append)
        host = LocalHost(Worker, room=1)
        cfg = Replicated(min=3, cpus=4, labels={"group": "generators"})
        starting = asyncio.create_task(starter.start(Pool(host, cfg), cfg))
        await asyncio.sleep(75)
        host.make_room(3)
        pool = await starting
        assert starter.pools == [pool]
        await asyncio.sleep(60)  # the start is over
        starter.stop()

    virtual_clock.run(scenario())
    asked = "each asks for 4 CPUs and a node with the labels group=generators"
    limit = f"({asked}; at most 300 s, ray.startup_timeout_s)"
    assert told == [
        f"Worker(1), Worker(2) wait for a node with room: {waited} s so far {limit}" for waited in (10, 40, 70)
    ]


def test_a_start_with_room_says_nothing_and_extra_replicas_may_wait():
    told = []

    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=300), lambda event: None, told.append)
        cfg = Replicated(min=1, max=2)
        pool = await starter.start(Pool(LocalHost(Worker, room=1), cfg), cfg)
        await asyncio.sleep(60)
        assert [replica.state for replica in pool.members.replicas] == ["ready", "pending"]
        assert pool.members.waiting == []
        starter.stop()

    virtual_clock.run(scenario())
    assert told == []


@pytest.mark.parametrize(("autoscaler", "patience_s"), [(False, 0), (True, 30)])
def test_pools_and_ranks_of_a_run_have_one_order(autoscaler, patience_s):
    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=60, autoscaler=autoscaler), lambda event: None)
        shared = starter.for_ranks()["precedence"]
        shared.wait("learner", "Learner", Placed(cpus=1))
        cfg = Replicated(min=1, max=2, cpus=1)
        pool = await starter.start(Pool(LocalHost(Worker), cfg), cfg)
        await asyncio.sleep(1)
        assert len(pool.members.replicas) == (2 if autoscaler else 1)  # without one, the extra replica is held back
        await asyncio.sleep(39)
        assert shared.waits_s(Placed(cpus=1)) == {"Learner": pytest.approx(40 - patience_s, abs=0.5)}
        starter.stop()

    virtual_clock.run(scenario())


def test_a_run_says_which_needed_replicas_wait_and_that_extra_ones_make_room(monkeypatch):
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.1)
    told = []

    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=60), lambda event: None, told.append)
        extra, needed = Replicated(min=1, max=3, cpus=1), Replicated(cpus=1, max_shortage_s=90)
        host = LocalHost(Other)
        await starter.start(Pool(LocalHost(Worker, room=2), extra), extra)
        pool = await starter.start(Pool(host, needed), needed)
        for _ in range(2):  # each time that it waits
            host.make_room(0)
            pool.members.lose(pool.ready[0], ConnectionError("its node is gone"))
            await asyncio.sleep(20)
            host.make_room(1)
            await asyncio.sleep(100)
            assert len(pool.ready) == 1
        starter.stop()

    virtual_clock.run(scenario())
    makes_room = "Worker: no extra replicas until Other has a node"
    waits = "Other(0) waits for a node with room: 10 s so far (it asks for 1 CPU; at most 90 s, max_shortage_s)"
    assert [sorted(told[:2]), sorted(told[2:])] == [[waits, makes_room]] * 2


def test_a_pool_that_waits_for_its_own_replicas_is_told_once(monkeypatch):
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.1)
    told = []

    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=60), lambda event: None, told.append)
        host, cfg = LocalHost(Worker, room=0), Replicated(min=1, max=4, cpus=1)
        starting = asyncio.create_task(starter.start(Pool(host, cfg), cfg))
        await asyncio.sleep(30)
        host.make_room(1)
        await starting
        await asyncio.sleep(60)
        starter.stop()

    virtual_clock.run(scenario())
    assert [text.partition(" waits for a node with room: 10 s")[0] for text in told] == ["Worker(0)"]


def test_stop_also_ends_a_pool_that_is_still_starting():
    async def scenario():
        starter = Starter(RayConfig(startup_timeout_s=60), lambda event: None)
        host, cfg = LocalHost(Worker, room=1), Replicated(min=2)
        starting = asyncio.create_task(starter.start(Pool(host, cfg), cfg))
        await asyncio.sleep(10)
        starter.stop()
        assert [handle.dead for handle in host.handles] == [True, True]
        starting.cancel()

    virtual_clock.run(scenario())
