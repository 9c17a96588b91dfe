"""Who is in a pool, and what becomes of calls, weights and responses when replicas come and go; all in this process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import actors.pool.deaths as deaths
import actors.pool.membership as membership
import actors.pool.pool as pool_module
from actors.generation.engine import Completion
from actors.generation.generator import Generator
from actors.pool.pool import Pool
from actors.pool.replica import PoolEvent
from actors.pool.roles import GeneratorPool
from common.config.base import Replicated
from common.errors import EngineDeadError, GivenUpError, RoleError, UserError
from common.types import HANDED_OVER
from common.weights import Manifest, PublishedBucket, buckets
from tests.fakes import LocalHost, make_prompt


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(membership, "TICK_S", 0.01)
    monkeypatch.setattr(pool_module, "TICK_S", 0.01)
    monkeypatch.setattr(deaths, "BACKOFF_S", 0.02)


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


class NeverStarts(Worker):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        raise AssertionError("not reached: see the test")


@dataclass
class Joined:
    """A pool of Workers with all that happened to it."""

    host: LocalHost
    pool: Pool
    events: list[PoolEvent] = field(default_factory=list)

    @classmethod
    async def start(cls, room: int = 1 << 30, role: type = Worker, **settings) -> Joined:
        host = LocalHost(role, room=room)
        events: list[PoolEvent] = []
        pool = Pool(host, Replicated(**settings), on_event=events.append)
        return cls(host, await pool.start(timeout_s=5), events)

    def told(self, event: str) -> list[str]:
        return [e.replica for e in self.events if e.event == event]

    async def work(self, seconds: float = 0.0, cost: int = 1) -> str:
        return await self.pool.call("work", lambda handle: handle.work.remote(seconds), cost=cost)


async def until(condition, *, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_pool_starts_with_min_and_grows_to_max_as_there_is_room():
    async def scenario():
        it = await Joined.start(room=1, max=5)
        assert len(it.pool.ready) == 1
        await asyncio.sleep(0.1)
        # One runs, and no more than two wait for room: a demand that an autoscaler sees, and no flood of it.
        assert [handle.name for handle in it.host.handles] == ["Worker(0)", "Worker(1)", "Worker(2)"]
        it.host.make_room(4)
        await until(lambda: len(it.pool.ready) == 4)
        it.host.make_room(9)
        await until(lambda: len(it.pool.ready) == 5)
        await asyncio.sleep(0.05)
        assert len(it.host.handles) == 5
        assert it.told("joined") == [f"Worker({i})" for i in range(5)]

    run(scenario)


def test_the_calls_of_a_dead_replica_are_answered_by_another_and_it_is_replaced():
    async def scenario():
        it = await Joined.start(min=2)
        calls = [asyncio.create_task(it.work(0.2)) for _ in range(6)]
        await asyncio.sleep(0.05)
        it.host.alive("Worker(0)").die()
        assert await asyncio.gather(*calls) == ["Worker(1)"] * 6
        [death] = [event for event in it.events if event.event == "died"]
        assert (death.replica, death.calls, death.node) == ("Worker(0)", 3, "node of Worker(0)")
        await until(lambda: len(it.pool.ready) == 2)
        assert it.told("joined") == ["Worker(0)", "Worker(1)", "Worker(0)"]

    run(scenario)


def test_replacements_that_die_come_after_growing_pauses(monkeypatch):
    async def scenario():
        it = await Joined.start(min=1)
        created = []
        loop = asyncio.get_running_loop()
        create = it.host.create

        def note(name):
            created.append(loop.time())
            return create(name)

        monkeypatch.setattr(it.host, "create", note)
        began = loop.time()
        for number in range(1, 5):
            await until(lambda: len(it.pool.ready) == 1)
            it.host.alive("Worker(0)").die()
            await asyncio.gather(it.work())  # the call finds out
            await until(lambda number=number: len(created) == number)
        pauses = np.diff([began, *created])
        # 20, 40, 80, 160 ms at least, whatever the machine adds.
        assert all(pause >= 0.02 * 2**i for i, pause in enumerate(pauses)), pauses

    run(scenario)


def test_a_silent_process_is_replaced_and_a_slow_call_alone_kills_nobody():
    async def scenario():
        it = await Joined.start(min=2, probe_timeout_s=0.1)
        slow = asyncio.create_task(it.work(0.5))
        await asyncio.sleep(0.01)
        it.host.alive("Worker(1)").silent = True
        await until(lambda: it.told("died") == ["Worker(1)"])
        assert "answered no health probe for 0.1 s (probe_timeout_s)" in it.events[-1].reason
        assert await slow == "Worker(0)"
        assert it.told("died") == ["Worker(1)"]

    run(scenario)


def test_a_call_that_takes_replica_after_replica_with_it_is_given_up():
    async def scenario():
        it = await Joined.start(min=4)
        with pytest.raises(GivenUpError, match="fail: 3 Worker replicas died of it: broken step"):
            await it.pool.call("fail", lambda handle: handle.fail.remote(EngineDeadError("broken step")))
        await until(lambda: len(it.told("died")) == 3)
        assert await it.work() == "Worker(3)"

    run(scenario)


def test_the_calls_beside_a_deadly_one_are_answered():
    """All share the replicas that die, but only one is alone with the last."""

    async def scenario():
        it = await Joined.start(min=1)
        deadly = asyncio.create_task(
            it.pool.call("fail", lambda handle: handle.fail.remote(EngineDeadError("broken step")))
        )
        others = [asyncio.create_task(it.work(0.05)) for _ in range(5)]
        assert await asyncio.gather(*others) == ["Worker(0)"] * 5
        with pytest.raises(GivenUpError, match="fail: 3 Worker replicas died of it"):
            await deadly

    run(scenario)


def test_three_deaths_of_one_cause_without_an_answered_call_end_the_run():
    """As where every process dies at its first request. What differs in the message, such as an address, is no other
    cause."""

    async def scenario():
        it = await Joined.start(min=1)
        deaths = iter(range(100))

        async def fail(handle):
            return await handle.fail.remote(EngineDeadError(f"head_dim=16 at 0x7f{next(deaths)}a, pid {next(deaths)}"))

        calls = [asyncio.create_task(it.pool.call("fail", fail)) for _ in range(4)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        # The first call that is tried alone is given up, as if it alone were deadly. The second one's death ends the
        # run, and the others with it.
        assert sorted(type(answer).__name__ for answer in answers) == ["GivenUpError"] * 2 + ["RoleError"] * 2
        [message] = {str(answer) for answer in answers if isinstance(answer, RoleError)}
        assert message.startswith("Worker died 3 times of the same cause, and answered no call in between: head_dim=16")
        await until(lambda: len(it.told("died")) >= 4)
        with pytest.raises(RoleError, match="died 3 times"):
            await it.work()

    run(scenario)


def test_deaths_of_one_cause_between_answered_calls_end_nothing():
    async def scenario():
        it = await Joined.start(min=1)
        for death in range(5):
            await until(lambda: len(it.pool.ready) == 1)
            it.pool.members.lose(it.pool.ready[0], EngineDeadError("killed"))
            await until(lambda death=death: len(it.told("died")) == death + 1)
            assert (await it.work()).startswith("Worker(")

    run(scenario)


def test_deaths_of_different_causes_end_nothing():
    async def scenario():
        it = await Joined.start(min=1)
        for death, cause in enumerate(["killed", "out of memory", "killed", "out of memory"]):
            await until(lambda: len(it.pool.ready) == 1)
            it.pool.members.lose(it.pool.ready[0], EngineDeadError(cause))
            await until(lambda death=death: len(it.told("died")) == death + 1)
        assert (await it.work()).startswith("Worker(")

    run(scenario)


def test_the_only_replica_is_replaced_as_soon_as_it_has_joined_once(monkeypatch):
    """Also where the pool has not looked at its cluster since, which may not answer for a while."""

    async def scenario():
        host = LocalHost(Worker)
        monkeypatch.setattr(membership, "TICK_S", 0.3)
        pool = Pool(host, Replicated())
        await pool.start(timeout_s=5)
        host.alive("Worker(0)").die()
        answer = await pool.call("work", lambda handle: handle.work.remote(0))
        assert answer.startswith("Worker(")

    run(scenario)


def test_an_event_that_cannot_be_written_down_loses_no_replica():
    def full(event: PoolEvent) -> None:
        raise OSError(28, "No space left on device")

    async def scenario():
        pool = Pool(LocalHost(Worker), Replicated(), on_event=full)
        await pool.start(timeout_s=5)
        assert await pool.call("work", lambda handle: handle.work.remote(0)) == "Worker(0)"

    run(scenario)


def test_a_call_whose_replicas_are_told_to_go_is_never_given_up():
    async def scenario():
        it = await Joined.start(min=1, drain_s=0.02)
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
        it = await Joined.start(role=Slow, min=2, max_shortage_s=0.1)
        assert len(it.pool.ready) == 2

    run(scenario)


def test_a_call_that_takes_too_long_names_replica_task_and_limit():
    async def scenario():
        it = await Joined.start(timeout_s=0.05)
        with pytest.raises(RoleError, match=r"Worker\(0\) did not work within 0.05 s \(timeout_s\)"):
            await it.work(5)
        assert it.told("died") == []

    run(scenario)


def test_calls_beyond_in_flight_wait_here_and_their_time_does_not_run():
    async def scenario():
        it = await Joined.start(in_flight=1, timeout_s=0.5)
        assert await asyncio.gather(*(it.work(0.2) for _ in range(4))) == ["Worker(0)"] * 4

    run(scenario)


def test_a_lower_wish_dismisses_the_least_loaded_which_finishes_what_it_has():
    async def scenario():
        it = await Joined.start(min=1, max=3)
        await until(lambda: len(it.pool.ready) == 3)
        calls = [asyncio.create_task(it.work(0.2, cost=cost)) for cost in (1, 10, 10)]
        await asyncio.sleep(0.02)
        it.pool.members.target = 2
        await until(lambda: it.told("leaving") == ["Worker(0)"])
        assert await it.work(0) in ("Worker(1)", "Worker(2)")  # no new work for it
        assert await asyncio.gather(*calls) == ["Worker(0)", "Worker(1)", "Worker(2)"]
        await until(lambda: it.told("left") == ["Worker(0)"])
        [left] = [event for event in it.events if event.event == "left"]
        assert (left.reason, left.calls) == ("the target was lowered", 0)
        assert it.host.handles[0].dead
        it.pool.members.target = 3
        await until(lambda: len(it.pool.ready) == 3)

    run(scenario)


def test_on_a_drain_notice_a_replica_leaves_and_what_it_cannot_finish_is_begun_again_elsewhere():
    async def scenario():
        it = await Joined.start(min=2, drain_s=0.1)
        calls = [asyncio.create_task(it.work(0.4)) for _ in range(2)]
        await asyncio.sleep(0.02)
        it.host.leaving = {"node of Worker(0)": 60.0}
        await until(lambda: it.told("leaving") == ["Worker(0)"])
        await until(lambda: it.told("left") == ["Worker(0)"])
        assert {event.reason for event in it.events if event.replica == "Worker(0)"} == {"", "its node is leaving"}
        assert [event.calls for event in it.events if event.event == "left"] == [1]
        first, second = await asyncio.gather(*calls)
        assert first in ("Worker(1)", "Worker(2)")  # the second one came for the first
        assert second == "Worker(1)"

    run(scenario)


def test_too_few_for_too_long_ends_the_pool_and_every_caller_hears_why():
    async def scenario():
        it = await Joined.start(min=2, max_shortage_s=0.2)
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


def test_a_pool_that_nobody_joins_says_so_when_start_up_time_is_over():
    async def scenario():
        pool = Pool(LocalHost(Worker, room=0), Replicated())
        with pytest.raises(UserError, match=r"for 0.1 s only 0 replicas were ready, .* Worker\(0\) pending"):
            await pool.start(timeout_s=0.1)

    run(scenario)


def test_a_first_replica_that_dies_in_its_start_is_the_error():
    class Broken(Worker):
        async def ready(self) -> str:
            raise ValueError("no such model")

    async def scenario():
        with pytest.raises(RoleError, match=r"start: Broken\(0\) died: no such model"):
            await Joined.start(role=Broken)

    run(scenario)


class SlowEngine:
    """Writes token `version` every 10 ms, up to `max_tokens`; its log-probabilities count the tokens."""

    stage_s = 0.02

    def __init__(self, max_tokens: int = 40) -> None:
        self.begun: list[int] = []
        self.version = self.staged = 0
        self.max_tokens = max_tokens
        self.leaving = False
        self.stages: list[int] = []

    async def generate(
        self, prompt_ids: np.ndarray, *, seed: int, num_begun: int = 0, plain_tokens: int = 0
    ) -> Completion:
        if plain_tokens:
            ids = np.zeros(plain_tokens, dtype=np.int32)
            return Completion(ids, ids.astype(np.float32), ids + self.version, "length")
        self.begun.append(num_begun)
        tokens: list[int] = []
        while num_begun + len(tokens) < self.max_tokens and not self.leaving:
            await asyncio.sleep(0.01)
            tokens.append(self.version)
        numbers = np.arange(num_begun, num_begun + len(tokens), dtype=np.float32)
        ids = np.array(tokens, dtype=np.int32)
        return Completion(ids, -numbers, ids, HANDED_OVER if self.leaving else "length")

    async def hand_over(self) -> None:
        self.leaving = True

    async def stage(self, bucket) -> None:
        await asyncio.sleep(self.stage_s)
        self.staged = bucket.version

    async def swap(self, version: int) -> float:
        assert self.staged == version
        self.version = version
        return 0.0


async def generators(max_tokens: int = 40, room: int = 1 << 30, **settings) -> tuple[Joined, GeneratorPool]:
    host = LocalHost(Generator, 0, lambda: SlowEngine(max_tokens), room=room)
    events: list[PoolEvent] = []
    service = GeneratorPool(host, Replicated(**settings), on_event=events.append)
    return Joined(host, await service.pool.start(timeout_s=5), events), service


async def published(version: int):
    import torch

    for bucket in buckets([("w", torch.full((4,), float(version)))], version):
        yield PublishedBucket(bucket, bucket)
    yield Manifest((8,), (8,))


def test_unfinished_responses_are_handed_over_and_gone_on_with_elsewhere():
    async def scenario():
        it, service = await generators(min=2, drain_s=0.1)
        calls = [asyncio.create_task(service.generate(make_prompt(i))) for i in range(4)]
        await asyncio.sleep(0.05)
        it.host.leaving = {"node of Generator(0)": 60.0}
        await until(lambda: it.told("left") == ["Generator(0)"])
        assert [event.calls for event in it.events if event.event == "left"] == [2]  # handed over
        await service.load(published(1), 1)
        it.host.leaving = {}
        rollouts = await service.fetch([(await call).rollout for call in calls])
        for rollout in rollouts:
            # Every token once, with the log-probability it was sampled with.
            assert rollout.rollout_logprobs.tolist() == [-float(i) for i in range(40)]
            assert rollout.finish_reason == "length"
            assert (rollout.response_ids == rollout.policy_versions).all()
            assert (np.diff(rollout.policy_versions) >= 0).all()
        assert "Generator(0)" not in {rollout.generator for rollout in rollouts}
        assert any(set(rollout.policy_versions) == {0, 1} for rollout in rollouts)
        engines = [handle.role._engine for handle in it.host.handles]
        assert sum(begun > 0 for engine in engines for begun in engine.begun) == 2  # gone on with, not begun anew

    run(scenario)


def test_what_was_begun_is_begun_anew_when_it_is_lost_on_its_way():
    async def scenario():
        it, service = await generators(min=1)

        async def gone():
            raise LookupError("its node is gone")

        lost = asyncio.ensure_future(gone())
        handle = it.host.alive("Generator(0)")
        answer = handle.role.generate
        asked = []

        async def begin(prompt, begun, plain_tokens):
            asked.append(begun)
            rollout, written = await answer(prompt, begun, plain_tokens)
            return rollout, written

        handle.role.generate = begin
        generate = service.pool.call

        async def hands_over_first(what, call, *, cost):
            if not asked:
                asked.append("first")
                _, written = await generate(what, call, cost=cost)
                return lost, replace(written, finished=False)
            return await generate(what, call, cost=cost)

        service.pool.call = hands_over_first
        written = await service.generate(make_prompt(3))
        assert written.finished
        assert asked == ["first", None, None]  # the second time it was given what is lost; then nothing
        [rollout] = await service.fetch([written.rollout])
        assert rollout.rollout_logprobs.tolist() == [-float(i) for i in range(40)]

    run(scenario)


def test_a_replica_that_comes_late_takes_the_newest_weights_before_it_gets_work():
    async def scenario():
        it, service = await generators(min=1, max=2, max_tokens=1, room=1)
        await service.load(published(1), 1)
        await service.load(published(2), 2)
        it.host.make_room(2)
        await until(lambda: len(it.pool.ready) == 2)
        versions = {}
        for _ in range(8):
            written = await service.generate(make_prompt())
            [rollout] = await service.fetch([written.rollout])
            versions[rollout.generator] = set(rollout.policy_versions)
        assert versions == {"Generator(0)": {2}}
        calls = [service.generate(make_prompt(i)) for i in range(8)]
        for written in await asyncio.gather(*calls):
            [rollout] = await service.fetch([written.rollout])
            assert set(rollout.policy_versions) == {2}, rollout.generator

    run(scenario)


def test_who_catches_up_while_newer_weights_come_takes_those_too_before_it_gets_work():
    async def scenario():
        it, service = await generators(min=1, max=2, max_tokens=1, room=1)
        await service.load(published(1), 1)
        await until(lambda: len(it.host.handles) == 2)
        it.host.make_room(2)
        it.host.handles[1].role._engine.stage_s = 0.2
        await asyncio.sleep(0.05)
        await service.load(published(2), 2)
        assert len(it.pool.ready) == 1  # the other one still stages version 1
        await until(lambda: len(it.pool.ready) == 2)
        assert [replica.handle.role._version for replica in it.pool.ready] == [2, 2]

    run(scenario)


def test_publications_and_joins_in_any_order_leave_every_routable_replica_with_the_wanted_version():
    async def scenario():
        it, service = await generators(min=1, max=6, max_tokens=1)
        it.host.room = 2
        wrong: list[str] = []
        opened = it.pool._router.open

        def check_and_open(number):
            replica = it.pool.members.find(number)
            if replica.handle.role._version != service._version:
                wrong.append(f"{replica.name} holds {replica.handle.role._version}, wanted {service._version}")
            opened(number)

        it.pool._router.open = check_and_open
        for version in range(1, 8):
            publication = asyncio.create_task(service.load(published(version), version))
            await asyncio.sleep(0.007 * version)
            it.host.make_room(min(6, 1 + version))
            if version == 4:
                it.host.alive("Generator(1)").die()
            await publication
            assert all(replica.handle.role._version == version for replica in it.pool.ready)
            answers = [asyncio.create_task(service.generate(make_prompt(i))) for i in range(12)]
            for answer in answers:
                [rollout] = await service.fetch([(await answer).rollout])
                assert set(rollout.policy_versions) == {version}
        assert not wrong
        await until(lambda: len(it.pool.ready) == 6)

    run(scenario)
