"""The learner group without Ray: its calls take turns, lost ranks are noticed and started again, and it reads only the
last item of a publication."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from common import node_waits
from common.config.base import Placed
from common.config.ppo import LearnerConfig
from common.errors import BatchError, RankLostError, RoleError, RolloutLostError
from common.precedence import Precedence
from common.types import Manifest, PublishedBucket, RolloutRef
from learner.ranks import node_waits as rank_waits
from learner.ranks import processes, rank_group
from learner.ranks.adapter_reference import AdapterReference
from learner.ranks.group import LearnerGroup
from tests.fakes import make_prompt, make_rollout


class FakeRank:
    """The process of a rank, in this one. Its methods take a while, and note when they are called and when they end."""

    def __init__(self, events: list[str] | None = None, rank: int = 0, *, room: bool = True) -> None:
        self.events = [] if events is None else events
        self.rank, self.room = rank, room
        self.frozen = False  # answers nothing
        self.dead = asyncio.Event()
        self.errors: dict[str, Exception] = {}  # by method

    def __getattr__(self, method: str) -> Any:
        return FakeMethod(self, method)

    async def answer(self, method: str, args: tuple[Any, ...]) -> Any:
        work = asyncio.ensure_future(self._work(method, args))
        died = asyncio.ensure_future(self.dead.wait())
        try:
            await asyncio.wait({work, died}, return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                raise RayActorError(error_msg="it was killed")
            return await work
        finally:
            work.cancel()
            died.cancel()

    async def _work(self, method: str, args: tuple[Any, ...]) -> Any:
        while self.frozen or not self.room:
            await asyncio.sleep(0.01)
        if method in ("__ray_ready__", "join", "__ray_call__"):
            if method in self.errors:
                raise self.errors[method]
            return {"__ray_call__": "nowhere"}.get(method)
        await asyncio.sleep(0.01)
        if method in self.errors:
            raise self.errors[method]
        self.events.append(f"{method} done")
        measured = [np.zeros(1, np.float32)] * len(args)
        return {"update": {}, "save": {}, "restore": 7, "skip": 8, "ref_logprobs": measured}.get(method)


class FakeMethod:
    def __init__(self, rank: FakeRank, method: str) -> None:
        self._rank, self._method = rank, method

    def options(self, *, concurrency_group: str) -> FakeMethod:
        assert concurrency_group == "health"
        return self

    def remote(self, *args: Any) -> Any:
        if self._method not in ("__ray_ready__", "join", "__ray_call__"):
            self._rank.events.append(f"{self._method} asked")
        return self._rank.answer(self._method, args)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Ray's own functions, over fake ranks."""
    monkeypatch.setattr(ray, "put", lambda value: value)
    loops: list[asyncio.AbstractEventLoop] = []
    monkeypatch.setattr(FakeRank, "loops", loops, raising=False)

    def kill(rank: Any) -> None:
        if isinstance(rank, FakeRank):
            loops[-1].call_soon_threadsafe(rank.dead.set)

    monkeypatch.setattr(processes.ray, "kill", kill)
    monkeypatch.setattr(rank_waits, "has_node", lambda rank: rank.room)


def run(scenario: Callable[[], Any]) -> Any:
    async def whole() -> Any:
        FakeRank.loops.append(asyncio.get_running_loop())
        return await scenario()

    return asyncio.run(asyncio.wait_for(whole(), 20))


async def started(
    create: Callable[[int], Any] | None = None,
    *,
    startup_timeout_s: float = 5,
    report: Any = None,
    precedence: Precedence | None = None,
    **cfg: Any,
) -> Any:
    """A group that has started, and the list of all its ranks, which grows when it starts again."""
    made: list[Any] = []

    def make(rank: int) -> Any:
        made.append((create or (lambda rank: FakeRank(rank=rank)))(rank))
        return made[-1]

    learner = LearnerGroup(
        make,
        LearnerConfig(**{"timeout_s": 7, "probe_timeout_s": 0.1, **cfg}),
        startup_timeout_s=startup_timeout_s,
        report=report,
        precedence=precedence,
        deltas=True,
    )
    await learner.start()
    return learner, made


# Calls


class PublishingGroup(LearnerGroup):
    events: list[str]

    async def _publish(self) -> AsyncGenerator[Any, None]:
        self.events.append("publish asked")
        for _ in range(2):
            await asyncio.sleep(0.01)
            yield None
        self.events.append("publish done")


def test_the_calls_of_a_rank_take_turns():
    events: list[str] = []

    async def publish_slowly(learner: LearnerGroup) -> None:
        async for _ in learner.publish():
            await asyncio.sleep(0.01)

    async def scenario() -> None:
        learner = PublishingGroup(lambda rank: FakeRank(events), LearnerConfig(), startup_timeout_s=5)
        learner.events = events
        await learner.start()
        await asyncio.gather(
            learner.update("batch"),
            learner.ref_logprobs(["a rollout"]),
            publish_slowly(learner),
            learner.ref_logprobs(["another"]),
            learner.save(Path("checkpoint")),
        )

    run(scenario)
    assert sorted(events) == sorted(f"{call} {part}" for call in CALLS for part in ("asked", "done"))
    assert all(asked.replace("asked", "done") == done for asked, done in zip(events[::2], events[1::2], strict=True))


CALLS = ["update", "ref_logprobs", "publish", "ref_logprobs", "save"]


def test_a_call_that_fails_gives_up_its_turn():
    async def scenario() -> None:
        learner, [rank] = await started()
        rank.errors["update"] = ValueError("no")
        with pytest.raises(ValueError, match="no"):
            await learner.update("batch")
        await learner.save(Path("checkpoint"))
        assert learner.step == 0

    run(scenario)


# Ranks that are lost


def test_a_rank_that_dies_in_an_update_is_lost_by_its_name():
    async def scenario() -> None:
        learner, ranks = await started(ranks=2)
        await learner.restore(Path("checkpoint"))
        updating = asyncio.create_task(learner.update("batch"))
        await asyncio.sleep(0.005)
        ranks[0].frozen = True  # it waits for the other
        ranks[1].dead.set()
        message = r'^Learner\(1\) died during "update at step 7": it was killed$'
        with pytest.raises(RankLostError, match=message):
            await updating
        with pytest.raises(RankLostError, match=message):  # and so does every later call
            await learner.save(Path("checkpoint"))
        assert learner.step == 7

    run(scenario)


def test_a_rank_that_freezes_in_an_update_is_lost_by_its_name():
    async def scenario() -> None:
        learner, ranks = await started(ranks=2)
        ranks[1].frozen = True
        message = (
            r'^Learner\(1\) answered no health probe for 0.1 s \(learner.probe_timeout_s\) during "update at step 0"$'
        )
        with pytest.raises(RankLostError, match=message):
            await learner.update("batch")

    run(scenario)


def test_a_death_that_a_probe_notices_first_names_the_call():
    async def scenario() -> None:
        learner, [rank] = await started()
        rank.errors["__ray_ready__"] = RayActorError(error_msg="it was killed")
        with pytest.raises(RankLostError, match=r'^Learner\(0\) died during "update at step 0": it was killed$'):
            await learner._call("update", lambda rank: asyncio.sleep(10))

    run(scenario)


def test_a_loss_while_nothing_is_called_ends_a_wait_for_other_work():
    async def scenario() -> None:
        learner, [rank] = await started()
        assert await learner.unless_lost(asyncio.sleep(0.3, "a batch")) == "a batch"
        waiting = asyncio.create_task(learner.unless_lost(forever := asyncio.Event().wait()))
        await asyncio.sleep(0.01)
        rank.dead.set()
        with pytest.raises(RankLostError, match=r'^Learner\(0\) died during "wait for a call"'):
            await waiting
        assert forever.cr_frame is None  # it was cancelled

    run(scenario)


def test_a_call_that_takes_too_long_counts_as_a_loss():
    async def scenario() -> None:
        learner, [rank] = await started(timeout_s=0.2, probe_timeout_s=30)
        rank.frozen = True
        with pytest.raises(
            RankLostError, match=r"Learner\(0\) did not update at step 0 within 0.2 s \(learner.timeout"
        ):
            await learner.update("batch")

    run(scenario)


def test_a_rank_that_stays_in_a_failed_call_is_lost_after_the_error(monkeypatch):
    """It may wait for the rank that failed, and would not answer the next call."""
    monkeypatch.setattr(rank_group, "_LATE_ERRORS_S", 0.05)

    async def scenario() -> None:
        learner, ranks = await started(ranks=2, probe_timeout_s=30)
        ranks[0].errors["update"] = ValueError("cannot learn from this")
        ranks[1].frozen = True
        with pytest.raises(ValueError, match="cannot learn") as raised:
            await learner.update("batch")
        assert raised.value.__notes__ == ["rank 0 of 2 did not update at step 0"]
        with pytest.raises(RankLostError, match=r"^Learner\(1\) did not end the step that failed in another rank"):
            await learner.restore(Path("checkpoint"))

    run(scenario)


def failed(error: Exception) -> Exception:
    return RayTaskError("update", "a traceback", error).as_instanceof_cause()


def test_of_several_errors_the_original_one_is_raised(monkeypatch):
    async def scenario(first: Exception, second: Exception) -> BaseException:
        learner, ranks = await started(ranks=2)
        ranks[0].errors["update"], ranks[1].errors["update"] = first, second
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the test looks at it
            await learner.update("batch")
        return raised.value

    connection, own = failed(RuntimeError("gloo: Connection closed by peer")), failed(ValueError("of its own"))
    for errors in ((connection, own), (own, connection)):
        assert isinstance(run(lambda errors=errors: scenario(*errors)), ValueError)
    lost = run(lambda: scenario(connection, connection))
    assert str(lost) == 'Learner(0) lost another rank during "update at step 0"'
    poison = run(lambda: scenario(failed(BatchError("nan")), failed(BatchError("nan"))))
    assert (type(poison), str(poison)) == (BatchError, "nan")  # without the trace of another process
    poison = run(lambda: scenario(connection, failed(BatchError("nan"))))
    assert type(poison) is BatchError


# Groups that start again


def test_a_lost_group_starts_again_and_answers():
    async def scenario() -> None:
        learner, ranks = await started(ranks=2)
        await learner.restore(Path("checkpoint"))
        ranks[1].frozen = True
        with pytest.raises(RankLostError):
            await learner.update("batch")
        await learner.rebuild()
        assert [rank.dead.is_set() for rank in ranks] == [True, True, False, False]
        assert learner.step == 0
        await learner.restore(Path("checkpoint"))
        await learner.update("batch")
        assert learner.step == 8
        await learner.unless_lost(asyncio.sleep(0.2))  # the new ranks answer their probes

    run(scenario)


@pytest.mark.parametrize(("room", "min_ranks", "expected"), [(3, 1, 3), (2, 1, 2), (1, 1, 1)])
def test_a_group_takes_as_many_ranks_as_there_is_room_for(room, min_ranks, expected):
    async def scenario() -> None:
        told: list[str] = []
        settings = {"ranks": 3, "min_ranks": min_ranks, "room_wait_s": 0.1}
        learner, ranks = await started(
            lambda rank: FakeRank(rank=rank, room=rank < room), report=told.append, **settings
        )
        sentence = f"the cluster has room for {expected} of 3 Learner processes (learner.ranks); the run continues"
        assert [message.startswith(sentence) for message in told] == [True] * (expected < 3)
        await learner.update("batch")
        await asyncio.sleep(0.05)
        assert [rank.dead.is_set() for rank in ranks] == [False] * expected + [True] * (3 - expected)
        assert [rank.events for rank in ranks[:expected]] == [["update asked", "update done"]] * expected

    run(scenario)


@pytest.mark.parametrize("min_ranks", [None, 1])
def test_ranks_that_wait_for_a_node_are_named_with_what_they_ask_for(min_ranks, monkeypatch):
    monkeypatch.setattr(node_waits, "TELL_AFTER_S", 0.05)
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.01)

    async def scenario() -> None:
        told: list[str] = []
        ranks = [FakeRank(rank=rank, room=rank == 0) for rank in range(3)]
        settings = {"ranks": 3, "min_ranks": min_ranks, "gpus": 1, "labels": {"group": "learner"}}
        starting = asyncio.create_task(started(ranks.__getitem__, report=told.append, **settings))
        while not told:
            await asyncio.sleep(0.01)
        for rank in ranks:
            rank.room = True
        await starting
        heard = len(told)
        await asyncio.sleep(0.1)
        assert len(told) == heard == 1
        limit = "at most 5 s, ray.startup_timeout_s"
        if min_ranks:
            limit += "; 60 s once 1 of 3 ranks are there, learner.room_wait_s"
        asked = "each asks for 1 CPU, 1 GPU and a node with the labels group=learner"
        assert told == [f"Learner(1), Learner(2) wait for a node with room: 0 s so far ({asked}; {limit})"]

    run(scenario)


def test_ranks_go_before_extra_replicas_until_as_many_as_the_group_needs_have_a_node(monkeypatch):
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.01)

    async def scenario() -> None:
        precedence = Precedence()
        ranks = [FakeRank(rank=rank, room=rank == 0) for rank in range(3)]
        starting = asyncio.create_task(started(ranks.__getitem__, precedence=precedence, ranks=3, min_ranks=2))
        await asyncio.sleep(0.2)
        assert precedence.waits_s(Placed(cpus=1))
        ranks[1].room = ranks[1].frozen = True  # it has a node, and loads its networks
        while precedence.waits_s(Placed(cpus=1)):
            await asyncio.sleep(0.01)
        assert not starting.done()
        ranks[1].frozen, ranks[2].room = False, True
        group, _ = await starting
        assert not precedence.waits_s(Placed(cpus=1))
        await group._processes.kill()
        assert precedence.waits_s(Placed(cpus=1))  # the group will start again
        group.stop()
        assert not precedence.waits_s(Placed(cpus=1))

    run(scenario)


def test_a_rank_that_has_a_node_and_loads_long_waits_for_none(monkeypatch):
    monkeypatch.setattr(node_waits, "TELL_AFTER_S", 0.05)
    monkeypatch.setattr(node_waits, "LOOK_EVERY_S", 0.01)

    async def scenario() -> None:
        told: list[str] = []
        rank = FakeRank()
        rank.frozen = True  # it loads its networks
        starting = asyncio.create_task(started(lambda _: rank, report=told.append))
        await asyncio.sleep(0.3)
        rank.frozen = False
        await starting
        assert told == []

    run(scenario)


def test_a_group_with_too_few_ranks_is_lost_and_says_what_to_do():
    async def scenario() -> None:
        with pytest.raises(RankLostError) as raised:
            await started(lambda rank: FakeRank(rank=rank, room=rank < 1), ranks=3, min_ranks=2, startup_timeout_s=0.2)
        assert str(raised.value).startswith("Learner(1), Learner(2) did not start within 0.2 s (ray.startup_timeout_s)")
        assert "lower learner.min_ranks" in str(raised.value)

    run(scenario)


def test_a_rank_that_dies_as_it_starts_is_lost_with_its_reason():
    async def scenario() -> None:
        def create(rank: int) -> FakeRank:
            made = FakeRank(rank=rank)
            FakeRank.loops[-1].call_soon_threadsafe(made.dead.set)
            return made

        with pytest.raises(RankLostError, match=r'^Learner\(0\) died during "start": it was killed'):
            await started(create)

    run(scenario)


def test_a_directory_that_creates_no_rank_is_a_loss_in_time():
    hangs = asyncio.Event()

    async def scenario() -> None:
        def create(rank: int) -> FakeRank:
            asyncio.run(hangs.wait())  # blocks its thread, as Ray's own call does

        with pytest.raises(RankLostError, match=r"Ray did not create Learner processes within 0.1 s"):
            await started(create, startup_timeout_s=0.1)

    run(scenario)  # and its thread keeps nothing from ending


# The learner as the reference


def some_ref() -> RolloutRef:
    return RolloutRef.of(make_rollout(make_prompt(), [4]))


def test_the_adapter_reference_waits_until_a_lost_group_was_rebuilt():
    async def scenario() -> None:
        learner, ranks = await started()
        ranks[0].frozen = True
        reference = AdapterReference(learner)
        measuring = asyncio.create_task(reference.logprobs(some_ref()))
        with pytest.raises(RankLostError):
            await learner.unless_lost(measuring)
        measuring = asyncio.create_task(reference.logprobs(some_ref()))
        await asyncio.sleep(0.1)
        assert not measuring.done()
        await learner.rebuild()
        logprobs, finite = await measuring
        assert (logprobs.tolist(), finite) == ([0.0], True)

    run(scenario)


def test_the_adapter_reference_says_that_a_rollout_is_lost():
    async def scenario() -> None:
        learner, [rank] = await started()
        rank.errors["ref_logprobs"] = ObjectLostError("00" * 28, None, "")
        with pytest.raises(RolloutLostError, match="lost with the node"):
            await AdapterReference(learner).logprobs(some_ref())
        await learner.update("batch")  # the group is not lost

    run(scenario)


# Publications


class Item:
    """A reference to a streamed value. Reading it returns the value, or raises it if it is an error."""

    def __init__(self, value: Any) -> None:
        self.value, self.was_read = value, False

    def __await__(self) -> Generator[Any, Any, Any]:
        self.was_read = True
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class StreamingRank(FakeRank):
    """Its method `publish` streams these items. With `hangs` it never ends."""

    def __init__(self, *items: Item, hangs: bool = False) -> None:
        super().__init__()
        self.items, self.hangs = items, hangs
        self.base: tuple[Any, ...] = ()
        self.publish = self

    def options(self, *, num_returns: str) -> StreamingRank:
        assert num_returns == "streaming"
        return self

    def remote(self, *base: Any) -> StreamingRank:
        self.base, self._left = base, list(self.items)
        return self

    def __next__(self) -> Item:
        if not self._left:
            raise StopIteration
        return self._left.pop(0)

    @property
    def is_ready(self) -> bool:
        return bool(self._left) or not self.hangs


@pytest.fixture
def streams(monkeypatch):
    """`ray.wait` over StreamingRanks."""

    def wait(ranks: list[StreamingRank], *, timeout: float, fetch_local: bool) -> tuple[list[StreamingRank], list[Any]]:
        assert not fetch_local
        return [rank for rank in ranks if rank.is_ready][:1], []

    monkeypatch.setattr(ray, "wait", wait)


def publish(*ranks: Callable[[], StreamingRank], times: int = 1, deltas: bool = False) -> tuple[list[Any], list[Any]]:
    """What the last of several publications yields, and the ranks."""

    async def scenario() -> tuple[list[Any], list[Any]]:
        made = [rank() for rank in ranks]
        cfg = LearnerConfig(ranks=len(ranks), timeout_s=7)
        learner = LearnerGroup(made.__getitem__, cfg, startup_timeout_s=5, deltas=deltas)
        await learner.start()
        for _ in range(times):
            published = [item async for item in learner.publish()]
        return published, made

    return run(scenario)


def test_only_the_manifest_of_a_publication_is_read(streams):
    first, second, end = Item("bucket 0"), Item("bucket 1"), Item(Manifest((8, 8), (8, 8)))
    published, [rank] = publish(lambda: StreamingRank(first, second, end))
    assert published == [PublishedBucket(first, first), PublishedBucket(second, second), end.value]
    assert [item.was_read for item in rank.items] == [False, False, True]


def test_the_buckets_of_a_complete_set_are_the_base_of_the_next_deltas(streams):
    full, delta, end = Item("bucket 0"), Item("its delta"), Item(Manifest((8,), (6,)))

    def create(rank: int) -> StreamingRank:
        return StreamingRank(Item(Manifest((), ()))) if rank else StreamingRank(full, end)

    async def scenario() -> list[Any]:
        learner, ranks = await started(create, ranks=2)
        assert [item async for item in learner.publish()] == [PublishedBucket(full, full), end.value]
        ranks[0].items = (full, delta, end)
        published = [item async for item in learner.publish()]
        assert (ranks[0].base, ranks[1].base) == ((full,), ())
        await learner.rebuild()
        assert [item async for item in learner.publish()] == [PublishedBucket(full, full), end.value]
        assert ranks[2].base == ()  # the first publication of a new group is complete
        return published

    assert run(scenario) == [PublishedBucket(full, delta), end.value]


def test_without_deltas_no_base_is_kept(streams):
    _, [rank] = publish(lambda: StreamingRank(Item("bucket 0"), Item(Manifest((8,), (8,)))), times=2)
    assert rank.base == ()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_error_in_place_of_the_last_item_is_raised(streams, number):
    buckets = [Item(f"bucket {index}") for index in range(number)]
    with pytest.raises(ValueError, match="cannot gather") as raised:
        publish(
            lambda: StreamingRank(*buckets, Item(ValueError("cannot gather"))),
            lambda: StreamingRank(Item(Manifest((), ()))),
        )
    assert raised.value.__notes__ == ["rank 0 of 2 did not publish weights at step 0"]
    assert not any(bucket.was_read for bucket in buckets)


def test_the_death_of_another_rank_is_an_error_with_its_name(streams):
    dead = Item(RayActorError(error_msg="its node is gone"))
    message = r'^Learner\(1\) died during "publish weights at step 0": its node is gone'
    with pytest.raises(RankLostError, match=message):
        publish(lambda: StreamingRank(Item("bucket 0"), hangs=True), lambda: StreamingRank(dead))


def test_a_rank_that_lost_its_connection_does_not_hide_the_death(streams):
    connection = Item(failed(RuntimeError("gloo: Connection closed by peer")))
    dead = Item(RayActorError(error_msg="its node is gone"))
    with pytest.raises(RankLostError, match=r"^Learner\(1\) died"):
        publish(lambda: StreamingRank(Item("bucket 0"), connection), lambda: StreamingRank(dead))


def test_a_publication_that_takes_too_long_names_the_ranks_that_hang(streams):
    message = r"^Learner\(0\) did not publish weights at step 0 within 7 s \(learner.timeout_s\)"
    with pytest.raises(RoleError, match=message):
        publish(lambda: StreamingRank(Item("bucket 0"), hangs=True), lambda: StreamingRank(Item(Manifest((), ()))))
