"""A pool in this process: what happens to calls when replicas join, leave, die and are replaced."""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial

import numpy as np
import pytest

from actors.pool import deaths, membership
from actors.pool.pool import Pool, Preferred
from actors.pool.replica import PoolEvent
from common.config.base import Replicated
from common.errors import EngineDeadError, GivenUpError, RoleError, UserError
from tests.actors.pool.scenario import Started, Worker, run, until
from tests.fakes import LocalHost, pending


def test_a_pool_starts_with_min_and_grows_to_max_as_there_is_room():
    async def scenario():
        it = await Started.start(room=1, max=11)
        assert len(it.pool.ready) == 1
        await asyncio.sleep(0.1)
        # One runs, and no more than eight wait for room: these are what an autoscaler sees.
        assert [handle.name for handle in it.host.handles] == [f"Worker({i})" for i in range(9)]
        it.host.make_room(4)
        await until(lambda: len(it.pool.ready) == 4)
        it.host.make_room(15)
        await until(lambda: len(it.pool.ready) == 11)
        await asyncio.sleep(0.05)
        assert len(it.host.handles) == 11
        assert it.told("joined") == [f"Worker({i})" for i in range(11)]

    run(scenario)


def test_another_replica_answers_the_calls_of_a_dead_one():
    async def scenario():
        it = await Started.start(min=2)
        calls = [asyncio.create_task(it.work(0.2)) for _ in range(6)]
        await asyncio.sleep(0.05)
        it.host.alive("Worker(0)").die()
        assert await asyncio.gather(*calls) == ["Worker(1)"] * 6
        [death] = [event for event in it.events if event.event == "died"]
        assert (death.replica, death.calls, death.node) == ("Worker(0)", 3, "node of Worker(0)")
        await until(lambda: len(it.pool.ready) == 2)
        assert it.told("joined") == ["Worker(0)", "Worker(1)", "Worker(0)"]

    run(scenario)


def test_the_delay_before_a_replacement_doubles_with_every_death(monkeypatch):
    async def scenario():
        it = await Started.start(min=1)
        created = []
        loop = asyncio.get_running_loop()
        create = it.host.create

        async def note(name):
            created.append(loop.time())
            return await create(name)

        monkeypatch.setattr(it.host, "create", note)
        began = loop.time()
        for number in range(1, 5):
            await until(lambda: len(it.pool.ready) == 1)
            it.host.alive("Worker(0)").die()
            await asyncio.gather(it.work())  # the call notices the death
            await until(lambda number=number: len(created) == number)
        pauses = np.diff([began, *created])
        # 20, 40, 80, 160 ms, and less than 20 ms more until the pool looks again.
        assert all(-1e-6 < pause - 0.02 * 2**i < 0.02 for i, pause in enumerate(pauses)), pauses

    run(scenario)


def test_no_replacement_starts_before_a_death_is_recorded():
    """The record sets the delay."""

    async def scenario():
        it = await Started.start(min=1)
        it.pool.members.lose(it.pool.ready[0], EngineDeadError("killed"))
        it.pool.members._adjust_size()
        assert [replica.state for replica in it.pool.members._replicas.values()] == ["dead"]
        await until(lambda: it.told("joined") == ["Worker(0)"] * 2)

    run(scenario)


def test_a_silent_process_is_replaced_and_a_slow_one_is_not():
    async def scenario():
        it = await Started.start(min=2, probe_timeout_s=0.1)
        slow = asyncio.create_task(it.work(0.5))
        await asyncio.sleep(0.01)
        it.host.alive("Worker(1)").silent = True
        await until(lambda: it.told("died") == ["Worker(1)"])
        assert "answered no health probe for 0.1 s (probe_timeout_s)" in it.events[-1].reason
        assert await slow == "Worker(0)"
        assert it.told("died") == ["Worker(1)"]

    run(scenario)


def test_a_call_that_kills_three_replicas_is_given_up():
    async def scenario():
        it = await Started.start(min=4)
        with pytest.raises(GivenUpError, match="fail: 3 Worker replicas died while running it: broken step"):
            await it.fail(EngineDeadError("broken step"))
        await until(lambda: len(it.told("died")) == 3)
        assert await it.work() == "Worker(3)"

    run(scenario)


def test_calls_that_share_a_replica_with_a_deadly_one_are_answered():
    """All of them run on the replicas that die, but only the deadly call is tried alone."""

    async def scenario():
        it = await Started.start(min=1)
        deadly = asyncio.create_task(it.fail(EngineDeadError("broken step")))
        others = [asyncio.create_task(it.work(0.05)) for _ in range(5)]
        assert await asyncio.gather(*others) == ["Worker(0)"] * 5
        with pytest.raises(GivenUpError, match="fail: 3 Worker replicas died while running it"):
            await deadly

    run(scenario)


def test_three_deaths_of_one_cause_without_an_answered_call_end_the_run():
    """For example when every process dies at its first request. Messages that differ in an address or a process id
    name the same cause."""

    async def scenario():
        it = await Started.start(min=1)
        deaths = iter(range(100))

        async def fail(handle):
            return await handle.fail.remote(EngineDeadError(f"head_dim=16 at 0x7f{next(deaths)}a, pid {next(deaths)}"))

        calls = [asyncio.create_task(it.pool.call("fail", fail)) for _ in range(4)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        # The first two calls that are tried alone are given up. With the second one's death the pool fails, and with
        # it the calls that are left.
        assert sorted(type(answer).__name__ for answer in answers) == ["GivenUpError"] * 2 + ["RoleError"] * 2
        [message] = {str(answer) for answer in answers if isinstance(answer, RoleError)}
        assert message.startswith("Worker died 3 times of the same cause, and answered no call in between: head_dim=16")
        await until(lambda: len(it.told("died")) >= 4)
        with pytest.raises(RoleError, match="died 3 times"):
            await it.work()

    run(scenario)


def test_deaths_of_one_cause_between_answered_calls_end_nothing():
    async def scenario():
        it = await Started.start(min=1)
        for death in range(5):
            await until(lambda: len(it.pool.ready) == 1)
            it.pool.members.lose(it.pool.ready[0], EngineDeadError("killed"))
            await until(lambda death=death: len(it.told("died")) == death + 1)
            assert (await it.work()).startswith("Worker(")

    run(scenario)


def test_deaths_of_different_causes_end_nothing():
    async def scenario():
        it = await Started.start(min=1)
        for death, cause in enumerate(["killed", "out of memory", "killed", "out of memory"]):
            await until(lambda: len(it.pool.ready) == 1)
            it.pool.members.lose(it.pool.ready[0], EngineDeadError(cause))
            await until(lambda death=death: len(it.told("died")) == death + 1)
        assert (await it.work()).startswith("Worker(")

    run(scenario)


def test_a_node_that_dies_with_many_replicas_costs_only_time(monkeypatch):
    """All of them die of one cause at once, and no call is answered in between."""
    monkeypatch.setattr(deaths, "BACKOFF_S", 0.2)

    async def scenario():
        it = await Started.start(min=2, max=8, node_of=lambda number: "first" if number < 6 else "second")
        await until(lambda: len(it.pool.ready) == 8)
        calls = [asyncio.create_task(it.work(0.5)) for _ in range(16)]
        await asyncio.sleep(0.05)
        for handle in it.host.handles[:6]:
            handle.die()
        assert set(await asyncio.gather(*calls)) <= {f"Worker({number})" for number in range(8)}
        assert len(it.told("died")) == 6
        # The delay has not doubled: after six deaths one after the other it would be 6.4 s.
        await until(lambda: len(it.pool.ready) == 8)

    run(scenario)


def test_the_only_replica_is_replaced_once_it_has_joined(monkeypatch):
    """Even if it dies before the pool looks at its cluster again."""

    async def scenario():
        host = LocalHost(Worker)
        monkeypatch.setattr(membership, "TICK_S", 0.3)
        pool = Pool(host, Replicated())
        await pool.start(timeout_s=5)
        host.alive("Worker(0)").die()
        answer = await pool.call("work", lambda handle: handle.work.remote(0))
        assert answer.startswith("Worker(")

    run(scenario)


def test_an_event_that_cannot_be_written_loses_no_replica():
    def full(event: PoolEvent) -> None:
        raise OSError(28, "No space left on device")

    async def scenario():
        pool = Pool(LocalHost(Worker), Replicated(), on_event=full)
        await pool.start(timeout_s=5)
        assert await pool.call("work", lambda handle: handle.work.remote(0)) == "Worker(0)"

    run(scenario)


def test_only_replicas_that_answer_close_what_they_have_open_before_their_processes_end():
    async def scenario():
        it = await Started.start(room=2, max=3)
        await until(lambda: len(it.pool.ready) == 2)
        it.host.alive("Worker(0)").die()
        await asyncio.gather(*(it.work(0.1) for _ in range(2)))  # the first call notices the death
        await until(lambda: len(it.pool.ready) == 2 and len(it.pool.members.replicas) == 3)
        assert it.host.closed == []
        ready = [replica.name for replica in it.pool.ready]
        it.pool.members.target = 1
        await until(lambda: it.told("left"))
        assert it.host.closed == it.told("left")
        it.pool.stop()
        assert sorted(it.host.closed) == sorted(ready)

    run(scenario)


class UnansweredHost(LocalHost):
    """From `freeze` on, its cluster answers nothing: questions end with an outage, and a creation does not end."""

    frozen = False

    def freeze(self) -> None:
        self.frozen = True

    async def create(self, name: str):
        while self.frozen:
            await asyncio.sleep(0.01)
        return await super().create(name)

    async def node(self, handle):
        await self._ask()
        return await super().node(handle)

    async def leaving_nodes(self):
        await self._ask()
        return await super().leaving_nodes()

    async def _ask(self) -> None:
        if self.frozen:
            await asyncio.sleep(0.1)
            raise TimeoutError


def test_a_shortage_ends_the_run_also_if_the_cluster_does_not_answer():
    async def scenario():
        host = UnansweredHost(Worker)
        pool = Pool(host, Replicated(max_shortage_s=0.5))
        await pool.start(timeout_s=5)
        host.freeze()
        host.alive("Worker(0)").die()
        message = r"^Worker: for 0.5 s only 0 replicas were ready, but at least 1 .*; there are: Worker\(0\) pending"
        with pytest.raises(UserError, match=message):
            await pool.call("work", lambda handle: handle.work.remote(0))
        pool.stop()

    run(scenario)


def test_a_pool_continues_when_the_cluster_answers_again():
    async def scenario():
        host = UnansweredHost(Worker)
        pool = Pool(host, Replicated())
        await pool.start(timeout_s=5)
        host.freeze()
        host.alive("Worker(0)").die()
        working = await pending(pool.call("work", lambda handle: handle.work.remote(0)))
        await until(lambda: [replica.state for replica in pool.members.replicas] == ["pending"])
        host.frozen = False
        assert await working == "Worker(0)"

    run(scenario)


def test_a_replica_that_joined_while_the_cluster_did_not_answer_leaves_with_its_node():
    class NoNodes(UnansweredHost):
        async def node(self, handle):
            if not self.handles.index(handle) and self.frozen:
                raise TimeoutError
            return f"node {self.handles.index(handle)}"

    async def scenario():
        host, events = NoNodes(Worker), []
        host.freeze()
        host.create = partial(LocalHost.create, host)
        pool = Pool(host, Replicated(), on_event=events.append)
        await pool.start(timeout_s=5)
        assert [replica.node for replica in pool.ready] == [None]
        host.frozen = False
        host.leaving = {"node 0": 60.0}
        await until(lambda: [event.reason for event in events if event.event == "left"] == ["its node is leaving"])
        pool.stop()

    run(scenario)


def test_a_call_whose_replicas_are_told_to_leave_is_never_given_up():
    async def scenario():
        it = await Started.start(min=1, drain_s=0.02)
        call = asyncio.create_task(it.work(0.3))
        for index in range(5):
            await asyncio.sleep(0.03)
            [replica] = it.pool.ready or [None]
            it.host.leaving = {replica.node: 60.0} if replica else {}
            await until(lambda index=index: len(it.told("left")) > index)
            it.host.leaving = {}
            await until(lambda: len(it.pool.ready) == 1)
        assert (await call).startswith("Worker(")

    run(scenario)


def test_a_start_of_several_may_take_longer_than_a_later_shortage():
    class Slow(Worker):
        async def ready(self) -> str:
            await asyncio.sleep(0.15 if self.name == "Slow(0)" else 0.4)
            return self.name

    async def scenario():
        it = await Started.start(role=Slow, min=2, max_shortage_s=0.1)
        assert len(it.pool.ready) == 2

    run(scenario)


def test_a_call_that_takes_too_long_names_replica_call_and_limit():
    async def scenario():
        it = await Started.start(timeout_s=0.05)
        with pytest.raises(RoleError, match=r"Worker\(0\) did not work within 0.05 s \(timeout_s\)"):
            await it.work(5)
        assert it.told("died") == []

    run(scenario)


def test_the_time_limit_of_a_call_does_not_run_while_it_waits():
    async def scenario():
        it = await Started.start(in_flight=1, timeout_s=0.5)
        assert await asyncio.gather(*(it.work(0.2) for _ in range(4))) == ["Worker(0)"] * 4

    run(scenario)


@pytest.mark.parametrize(("limit_s", "message"), [(0.05, "did not work within 0.05 s; find out"), (math.inf, None)])
def test_a_call_may_have_a_limit_of_its_own_or_none(limit_s, message):
    async def scenario():
        it = await Started.start(timeout_s=0.1 if message is None else 5)
        if message is None:
            assert await it.work(0.3, limit_s=limit_s) == "Worker(0)"
        else:
            with pytest.raises(RoleError, match=message):
                await it.work(1, limit_s=limit_s)

    run(scenario)


def test_a_call_without_limit_stays_without_one_when_the_replicas_have_slept():
    async def scenario():
        it = await Started.start(timeout_s=0.1)
        working = await pending(it.work(0.3, limit_s=math.inf))
        it.pool.limits.stop()
        asleep = await pending(it.work(0.3, limit_s=math.inf))
        it.pool.limits.start()
        assert await asyncio.gather(working, asleep) == ["Worker(0)"] * 2

    run(scenario)


def test_the_calls_of_a_conversation_go_to_the_replica_that_answered_last():
    async def scenario():
        it = await Started.start(min=3)
        conversation = Preferred()
        other = asyncio.create_task(it.work(0.5))
        await asyncio.sleep(0)
        assert await it.work(prefer=conversation) == "Worker(1)"
        assert await it.work() == "Worker(1)"
        await other
        assert await it.work() == "Worker(0)"  # the first of three idle ones
        assert [await it.work(prefer=conversation) for _ in range(3)] == ["Worker(1)"] * 3
        assert [replica.name for replica in it.pool.ready if replica.number == conversation.number] == ["Worker(1)"]

        failing = asyncio.create_task(it.work(0.3, prefer=conversation))
        await asyncio.sleep(0.05)
        it.host.alive("Worker(1)").die()
        assert await failing == "Worker(0)"
        assert await it.work(prefer=conversation) == "Worker(0)"

    run(scenario)


def test_a_lower_target_dismisses_the_least_loaded_replica():
    async def scenario():
        it = await Started.start(min=1, max=3)
        await until(lambda: len(it.pool.ready) == 3)
        calls = [asyncio.create_task(it.work(0.2, cost=cost)) for cost in (1, 10, 10)]
        await asyncio.sleep(0.02)
        it.pool.members.target = 2
        await until(lambda: it.told("leaving") == ["Worker(0)"])
        assert await it.work(0) in ("Worker(1)", "Worker(2)")  # Worker(0) gets no new calls
        assert await asyncio.gather(*calls) == ["Worker(0)", "Worker(1)", "Worker(2)"]
        await until(lambda: it.told("left") == ["Worker(0)"])
        [left] = [event for event in it.events if event.event == "left"]
        assert (left.reason, left.calls) == ("the target was lowered", 0)
        assert it.host.handles[0].dead
        it.pool.members.target = 3
        await until(lambda: len(it.pool.ready) == 3)

    run(scenario)


def test_a_lower_target_empties_one_node_before_the_next():
    """Each of two nodes has two replicas. The least loaded replica is on the first one, which has more work."""

    async def scenario():
        it = await Started.start(min=1, max=4, node_of=lambda number: "first" if number in (0, 1) else "second")
        await until(lambda: len(it.pool.ready) == 4)
        calls = [asyncio.create_task(it.work(0.3, cost=cost)) for cost in (1, 20, 2, 3)]
        await asyncio.sleep(0.02)
        it.pool.members.target = 3
        await until(lambda: it.told("leaving") == ["Worker(2)"])
        it.pool.members.target = 2
        await until(lambda: it.told("leaving") == ["Worker(2)", "Worker(3)"])
        await asyncio.gather(*calls)

    run(scenario)


def test_calls_that_a_drained_replica_cannot_finish_start_again():
    async def scenario():
        it = await Started.start(min=2, drain_s=0.1)
        calls = [asyncio.create_task(it.work(0.4)) for _ in range(2)]
        await asyncio.sleep(0.02)
        it.host.leaving = {"node of Worker(0)": 60.0}
        await until(lambda: it.told("leaving") == ["Worker(0)"])
        await until(lambda: it.told("left") == ["Worker(0)"])
        assert {event.reason for event in it.events if event.replica == "Worker(0)"} == {"", "its node is leaving"}
        assert [event.calls for event in it.events if event.event == "left"] == [1]
        first, second = await asyncio.gather(*calls)
        assert first in ("Worker(1)", "Worker(2)")  # Worker(2) replaced Worker(0)
        assert second == "Worker(1)"

    run(scenario)


def test_a_drain_notice_shortens_the_time_of_a_replica_that_leaves_already():
    async def scenario():
        it = await Started.start(min=1, max=2, drain_s=20)
        await until(lambda: len(it.pool.ready) == 2)
        calls = [asyncio.create_task(it.work(10)) for _ in range(2)]
        await asyncio.sleep(0.02)
        it.pool.members.target = 1
        await until(lambda: len(it.told("leaving")) == 1)
        [name] = it.told("leaving")
        noticed = time.monotonic()
        it.host.leaving = {f"node of {name}": 4.0}
        await until(lambda: it.told("left") == [name])
        assert time.monotonic() - noticed == pytest.approx(2, abs=0.6)  # half of what is left; not 20
        assert it.events[-1].calls == 1
        for call in calls:
            call.cancel()
        it.pool.stop()

    run(scenario)


def test_a_long_shortage_fails_every_caller_with_the_reason():
    async def scenario():
        it = await Started.start(min=2, max_shortage_s=0.2)
        waiting = [asyncio.create_task(it.work(10)) for _ in range(2)]
        await asyncio.sleep(0.02)
        it.host.room = 0
        for handle in it.host.handles[:2]:
            handle.die()
        message = (
            r"Worker: for 0.2 s only 0 replicas were ready, but at least 2 \(min\) are needed; "
            r".* continue with --resume"
        )
        for call in waiting:
            with pytest.raises(UserError, match=message):
                await call
        with pytest.raises(UserError, match=message):
            await it.work()

    run(scenario)


def test_a_pool_without_room_fails_when_its_start_up_time_is_over():
    async def scenario():
        pool = Pool(LocalHost(Worker, room=0), Replicated())
        remedies = r"Free some resources, add nodes, raise ray\.startup_timeout_s"
        message = r"for 0.1 s only 0 replicas were ready, .* Worker\(0\) pending\. " + remedies
        with pytest.raises(UserError, match=message):
            await pool.start(timeout_s=0.1)

    run(scenario)


def test_the_death_of_the_first_replica_fails_the_start():
    class Broken(Worker):
        async def ready(self) -> str:
            raise ValueError("no such model")

    async def scenario():
        with pytest.raises(RoleError, match=r"start: Broken\(0\) died: no such model"):
            await Started.start(role=Broken)

    run(scenario)


def test_a_replica_suspended_twice_gets_calls_after_both_reasons_are_gone():
    async def scenario():
        it = await Started.start(min=1)
        [replica] = it.pool.ready
        for why in ("one", "another", "one"):
            it.pool.members.suspend(replica, why)
        it.pool.members.resume(replica, "one")
        waiting = await pending(it.work())
        it.pool.members.resume(replica, "another")
        assert await waiting == "Worker(0)"

    run(scenario)
