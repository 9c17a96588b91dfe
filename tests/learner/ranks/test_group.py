"""The learner group without Ray: whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.ranks import group
from learner.ranks.group import LearnerGroup


class FakeRank:
    """Its methods take a while, and note when they are called and when they are done."""

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
        return {"update": {}, "ref_logprobs": [np.zeros(1, np.float32)] * count}.get(method)


class PublishingGroup(LearnerGroup):
    def __init__(self, events: list[str]) -> None:
        super().__init__([FakeRank(events)], timeout_s=60)
        self._events = events

    async def _publish(self) -> AsyncIterator[Any]:
        self._events.append("publish asked")
        for _ in range(2):
            await asyncio.sleep(0.01)
            yield None
        self._events.append("publish done")


def test_a_rank_is_asked_for_one_thing_at_a_time_so_no_time_limit_runs_in_its_queue(monkeypatch):
    monkeypatch.setattr(group.ray, "put", lambda value: value)
    events: list[str] = []

    async def publish(learner: LearnerGroup) -> None:
        async for _ in learner.publish():
            await asyncio.sleep(0.01)

    async def scenario() -> None:
        learner = PublishingGroup(events)
        await asyncio.gather(
            learner.update("batch"),
            learner.ref_logprobs(["a rollout"]),
            publish(learner),
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
