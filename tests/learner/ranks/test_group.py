"""The learner group without Ray: its calls take turns, and it reads only the last item of a publication."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from common.errors import RoleError
from common.types import Manifest, PublishedBucket
from learner.ranks import group
from learner.ranks.group import LearnerGroup


class FakeRank:
    """Its methods take a while, and note when they are called and when they end."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def __getattr__(self, method: str) -> Any:
        class Method:
            def remote(_, *args: Any) -> Any:
                self._events.append(f"{method} asked")
                return self._answer(method, len(args))

        return Method()

    async def _answer(self, method: str, count: int) -> Any:
        await asyncio.sleep(0.01)
        self._events.append(f"{method} done")
        return {"update": {}, "save": {}, "ref_logprobs": [np.zeros(1, np.float32)] * count}.get(method)


class PublishingGroup(LearnerGroup):
    def __init__(self, events: list[str]) -> None:
        super().__init__([FakeRank(events)], timeout_s=60)
        self._events = events

    async def _publish(self) -> AsyncGenerator[Any, None]:
        self._events.append("publish asked")
        for _ in range(2):
            await asyncio.sleep(0.01)
            yield None
        self._events.append("publish done")


def test_the_calls_of_a_rank_take_turns(monkeypatch):
    monkeypatch.setattr(group.ray, "put", lambda value: value)
    events: list[str] = []

    async def publish_slowly(learner: LearnerGroup) -> None:
        async for _ in learner.publish():
            await asyncio.sleep(0.01)

    async def scenario() -> None:
        learner = PublishingGroup(events)
        await asyncio.gather(
            learner.update("batch"),
            learner.ref_logprobs(["a rollout"]),
            publish_slowly(learner),
            learner.ref_logprobs(["another"]),
            learner.save(Path("checkpoint")),
        )

    asyncio.run(scenario())
    calls = ["update", "ref_logprobs", "publish", "ref_logprobs", "save"]
    assert events == [f"{call} {part}" for call in calls for part in ("asked", "done")]


def test_a_call_that_fails_gives_up_its_turn(monkeypatch):
    monkeypatch.setattr(group.ray, "put", lambda value: value)

    async def scenario() -> None:
        learner = LearnerGroup([FakeRank([])], timeout_s=60)
        monkeypatch.setattr(FakeRank, "_answer", fail)
        with pytest.raises(ValueError, match="no"):
            await learner.update("batch")
        monkeypatch.undo()
        await learner.save(Path("checkpoint"))

    async def fail(self: FakeRank, method: str, count: int) -> Any:
        raise ValueError("no")

    asyncio.run(asyncio.wait_for(scenario(), 10))


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


class StreamingRank:
    """Its method `publish` streams these items. With `hangs` it never ends."""

    def __init__(self, *items: Item, hangs: bool = False) -> None:
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

    monkeypatch.setattr(group.ray, "wait", wait)


def publish(*ranks: StreamingRank, times: int = 1, **settings: Any) -> list[Any]:
    """What the last of several publications yields."""

    async def scenario() -> list[Any]:
        learner = LearnerGroup(list(ranks), timeout_s=7, **settings)
        for _ in range(times):
            published = [item async for item in learner.publish()]
        return published

    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_only_the_manifest_of_a_publication_is_read(streams):
    first, second, end = Item("bucket 0"), Item("bucket 1"), Item(Manifest((8, 8), (8, 8)))
    rank = StreamingRank(first, second, end)
    assert publish(rank) == [PublishedBucket(first, first), PublishedBucket(second, second), end.value]
    assert [item.was_read for item in rank.items] == [False, False, True]


def test_the_buckets_of_a_complete_set_are_the_base_of_the_next_deltas(streams):
    full, delta, end = Item("bucket 0"), Item("its delta"), Item(Manifest((8,), (6,)))
    rank, helper = StreamingRank(full, end), StreamingRank(Item(Manifest((), ())))

    async def scenario() -> list[Any]:
        learner = LearnerGroup([rank, helper], timeout_s=7, deltas=True)
        assert [item async for item in learner.publish()] == [PublishedBucket(full, full), end.value]
        rank.items = (full, delta, end)
        published = [item async for item in learner.publish()]
        assert (rank.base, helper.base) == ((full,), ())
        return published

    assert asyncio.run(scenario()) == [PublishedBucket(full, delta), end.value]


def test_without_deltas_no_base_is_kept(streams):
    rank = StreamingRank(Item("bucket 0"), Item(Manifest((8,), (8,))))
    publish(rank, times=2)
    assert rank.base == ()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_error_in_place_of_the_last_item_is_raised(streams, number):
    buckets = [Item(f"bucket {index}") for index in range(number)]
    with pytest.raises(ValueError, match="cannot gather") as raised:
        publish(StreamingRank(*buckets, Item(ValueError("cannot gather"))), StreamingRank(Item(Manifest((), ()))))
    assert raised.value.__notes__ == ["rank 0 of 2 did not publish weights at step 0"]
    assert not any(bucket.was_read for bucket in buckets)


def test_the_death_of_another_rank_is_an_error_with_its_name(streams):
    dead = StreamingRank(Item(RayActorError(error_msg="its node is gone")))
    with pytest.raises(
        RoleError, match=r"^Learner\(1\) died while it was to publish weights at step 0: its node is gone"
    ):
        publish(StreamingRank(Item("bucket 0"), hangs=True), dead)


def test_a_publication_that_takes_too_long_names_the_ranks_that_hang(streams):
    hanging = StreamingRank(Item("bucket 0"), hangs=True)
    message = r"^Learner\(0\) did not publish weights at step 0 within 7 s \(learner.timeout_s\)"
    with pytest.raises(RoleError, match=message):
        publish(hanging, StreamingRank(Item(Manifest((), ()))))
