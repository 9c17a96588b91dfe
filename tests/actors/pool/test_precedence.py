"""Extra replicas make room for processes that the run needs."""

from __future__ import annotations

import asyncio
import time

import pytest

from actors.pool import size
from actors.pool.pool import Pool
from common.config.base import Placed, Replicated
from common.precedence import Precedence
from tests.actors.pool.scenario import Worker, run, until
from tests.fakes import LocalHost

ASKED = Placed(cpus=1)  # for each process


def states(pool: Pool) -> list[str]:
    return sorted(replica.state for replica in pool.members.replicas)


def scenario(play, room: int = 4) -> None:
    """Runs `play` with a pool of one to four replicas that was not started yet."""

    async def played() -> None:
        host, events, precedence = LocalHost(Worker, room=room), [], Precedence()
        pool = Pool(host, Replicated(min=1, max=4, cpus=1), on_event=events.append)
        try:
            await play(pool, host, precedence, events)
        finally:
            pool.stop()

    run(played)


async def grown(pool: Pool, precedence: Precedence) -> None:
    """Starts the pool, and waits until all its replicas are ready."""
    await pool.start(10, precedence)
    await until(lambda: states(pool) == ["ready"] * 4)


def test_no_extra_replica_is_created_while_a_needed_process_waits():
    async def play(pool, host, precedence, events):
        precedence.wait("learner", "Learner", ASKED)
        await pool.start(10, precedence)
        await asyncio.sleep(0.1)
        assert states(pool) == ["ready"]
        assert len(host.handles) == 1
        precedence.end_wait("learner")
        await until(lambda: states(pool) == ["ready"] * 4)

    scenario(play)


def test_replicas_without_a_node_are_withdrawn_and_asked_for_again():
    async def play(pool, host, precedence, events):
        await pool.start(10, precedence)
        await until(lambda: states(pool) == ["pending"] * 2 + ["ready"] * 2)
        precedence.wait("learner", "Learner", ASKED)
        await until(lambda: states(pool) == ["ready"] * 2)
        host.make_room(4)  # what was withdrawn does not take it
        await asyncio.sleep(0.1)
        assert states(pool) == ["ready"] * 2
        precedence.end_wait("learner")
        await until(lambda: states(pool) == ["ready"] * 4)
        assert [event.event for event in events] == ["joined"] * 4  # withdrawing a replica emits no event

    scenario(play, room=2)


def test_running_replicas_end_one_after_the_other_down_to_min(monkeypatch):
    monkeypatch.setattr(size, "GIVE_WAY_S", 0.3)

    async def play(pool, host, precedence, events):
        await grown(pool, precedence)
        precedence.wait("learner", "Learner", ASKED)
        began, ended = time.monotonic(), []
        while len(ended) < 3:
            left = [event for event in events if event.event == "left"]
            ended.extend([time.monotonic() - began] * (len(left) - len(ended)))
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.01)
        assert all(after >= 0.3 * (number + 1) for number, after in enumerate(ended))
        await asyncio.sleep(0.4)
        assert states(pool) == ["ready"]  # the run needs it
        assert {event.reason for event in left} == {"it makes room for a process that the run needs"}
        precedence.end_wait("learner")
        await until(lambda: states(pool) == ["ready"] * 4)

    scenario(play)


def test_a_pool_waits_itself_while_fewer_than_min_have_a_node():
    async def play(pool, host, precedence, events):
        starting = asyncio.create_task(pool.start(10, precedence))
        await asyncio.sleep(0.1)
        assert precedence.waits_s(ASKED)
        assert states(pool) == ["pending"]
        host.make_room(1)
        await starting
        await until(lambda: not precedence.waits_s(ASKED))
        await until(lambda: states(pool) == ["pending"] * 3 + ["ready"])
        host.make_room(0)
        pool.members.lose(pool.members.ready[0], ConnectionError("its node is gone"))
        await until(lambda: precedence.waits_s(ASKED))
        await until(lambda: states(pool) == ["pending"])
        pool.stop()
        assert not precedence.waits_s(ASKED)

    scenario(play, room=0)


def test_a_replica_that_still_drains_makes_room_alone(monkeypatch):
    monkeypatch.setattr(size, "GIVE_WAY_S", 0.2)

    async def play(pool, host, precedence, events):
        await grown(pool, precedence)
        calls = [asyncio.create_task(pool.call("work", lambda handle: handle.work.remote(1.0))) for _ in range(4)]
        await asyncio.sleep(0.05)
        precedence.wait("learner", "Learner", ASKED)
        await until(lambda: "leaving" in states(pool))
        await asyncio.sleep(0.5)  # more than twice GIVE_WAY_S
        assert states(pool) == ["leaving", "ready", "ready", "ready"]
        await asyncio.gather(*calls)
        await until(lambda: states(pool) == ["ready"])

    scenario(play)


def test_the_next_replica_ends_as_soon_when_another_process_waits_then(monkeypatch):
    monkeypatch.setattr(size, "GIVE_WAY_S", 0.3)

    async def play(pool, host, precedence, events):
        await grown(pool, precedence)
        precedence.wait("learner", "Learner", ASKED)
        await asyncio.sleep(0.75)  # two have ended
        precedence.wait("reference", "Reference", ASKED)
        precedence.end_wait("learner")
        await until(lambda: len(states(pool)) == 1, within_s=1.5)

    scenario(play)


def test_a_replica_that_waits_for_a_node_goes_on_waiting_when_the_pool_starts_no_others():
    async def play(pool, host, precedence, events):
        starting = asyncio.create_task(pool.start(10, precedence))
        await until(lambda: states(pool) == ["pending"])
        await pool.members.hold_starts()
        pool.members._deaths.wait_until = time.monotonic() + 60
        await asyncio.sleep(0.1)
        assert precedence.waits_s(ASKED)
        starting.cancel()

    scenario(play, room=0)


def test_needed_processes_wait_first_while_an_autoscaler_may_add_nodes(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    precedence = Precedence(patience_s=150)
    precedence.wait("learner", "Learner", ASKED)
    now += 100
    precedence.wait("reference", "Reference", ASKED)
    assert not precedence.waits_s(ASKED)
    now += 60
    assert precedence.waits_s(ASKED) == {"Learner": 10}
    precedence.end_wait("learner")
    assert not precedence.waits_s(ASKED)  # the other one has waited for 60 s
    precedence.end_wait("reference")
    now += 1000
    assert not precedence.waits_s(ASKED)


@pytest.mark.parametrize(
    ("extra", "asks", "helps"),
    [
        ({"cpus": 1}, {"cpus": 4}, True),  # four of them may have enough
        ({"gpus": 0.5}, {"cpus": 1, "gpus": 1}, True),
        ({"cpus": 1}, {"gpus": 1}, False),
        ({"gpus": 1}, {"cpus": 1}, False),
        ({"cpus": 1, "gpus": 1}, {}, False),  # what reserves nothing needs no room
        ({}, {"cpus": 1, "gpus": 1}, False),
        ({"cpus": 1, "labels": {"group": "spot"}}, {"cpus": 1, "labels": {"group": "head"}}, False),
        ({"cpus": 1, "labels": {"group": "head"}}, {"cpus": 1, "labels": {"group": "head", "zone": "b"}}, True),
        ({"cpus": 1, "labels": {"kind": "a"}}, {"cpus": 1, "labels": {"group": "head"}}, True),  # a node may have both
    ],
)
def test_only_replicas_whose_room_may_help_make_room(extra, asks, helps):
    precedence = Precedence()
    precedence.wait("learner", "Learner", Placed(**asks))
    assert set(precedence.waits_s(Placed(**extra))) == ({"Learner"} if helps else set())


def test_a_pool_whose_room_does_not_help_grows_to_its_target():
    async def play(pool, host, precedence, events):
        precedence.wait("learner", "Learner", Placed(gpus=1))
        await grown(pool, precedence)
        assert pool.members.makes_room_for == {}

    scenario(play)


def test_a_pool_says_for_whom_it_makes_room():
    async def play(pool, host, precedence, events):
        precedence.wait("learner", "Learner", ASKED)
        await pool.start(10, precedence)
        await until(lambda: list(pool.members.makes_room_for) == ["Learner"])
        precedence.end_wait("learner")
        await until(lambda: pool.members.makes_room_for == {})
        pool.members.target = 1
        precedence.wait("learner", "Learner", ASKED)
        await asyncio.sleep(0.1)
        assert pool.members.makes_room_for == {}  # it has no extra replicas, and wants none

    scenario(play)
