"""Slots, order of admission, voids and staleness."""

from __future__ import annotations

import asyncio

import pytest

from common.config import UserError
from common.types import SampleId, Void
from learner.rollout_buffer import RolloutBuffer
from tests.fakes import make_experience


async def pending(coroutine) -> asyncio.Task:
    """The coroutine as a task that had every chance to run and is still waiting."""
    task = asyncio.create_task(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def test_admission_waits_until_slots_are_released():
    async def scenario():
        buffer = RolloutBuffer(2, 0)
        tickets = [await buffer.admit(), await buffer.admit()]
        third = await pending(buffer.admit())
        for ticket in tickets:
            await buffer.put(ticket, make_experience(ticket, [4, 1]))
        await buffer.take(2, policy_version=0)
        assert not third.done()  # taken, but the generators do not hold the new weights yet
        await buffer.release(2)
        assert await third == 3

    asyncio.run(scenario())


def test_a_batch_waits_for_the_oldest_rather_than_taking_the_fastest():
    async def scenario():
        buffer = RolloutBuffer(2, 1)
        first, second, third, _ = [await buffer.admit() for _ in range(4)]
        await buffer.put(second, make_experience(second, [4, 1]))
        await buffer.put(third, make_experience(third, [4, 1]))
        batch = await pending(buffer.take(2, policy_version=0))
        await buffer.put(first, make_experience(first, [4, 1]))
        rows, voids = await batch
        assert [row.rollout.prompt.sample_id.prompt for row in rows] == [first, second]
        assert voids == []

    asyncio.run(scenario())


def test_a_void_gives_its_slot_back_and_is_reported_once():
    async def scenario():
        buffer = RolloutBuffer(1, 0)
        void = Void(SampleId(0, 7, 0), "broken")
        await buffer.put(await buffer.admit(), void)
        ticket = await buffer.admit()
        await buffer.put(ticket, make_experience(ticket, [4, 1]))
        rows, voids = await buffer.take(1, policy_version=0)
        assert (len(rows), voids) == (1, [void])

    asyncio.run(scenario())


def test_rollouts_whose_oldest_token_is_too_old_are_voided_at_the_cut():
    async def scenario():
        buffer = RolloutBuffer(1, 1)
        stale, fresh = await buffer.admit(), await buffer.admit()
        await buffer.put(stale, make_experience(stale, [4, 5, 1], version=0))
        await buffer.put(fresh, make_experience(fresh, [4, 5, 1], version=1))
        rows, voids = await buffer.take(1, policy_version=2)
        assert rows[0].rollout.prompt.sample_id.prompt == fresh
        assert [void.sample_id.prompt for void in voids] == [stale]
        assert "1 versions" in voids[0].reason
        assert await buffer.admit() == 3  # the void's slot is free again

    asyncio.run(scenario())


def test_too_many_voids_end_the_wait():
    async def scenario():
        buffer = RolloutBuffer(2, 0, max_void_share=0.5)
        for index in range(3):  # 3 of 3 + 2 is more than half
            await buffer.put(await buffer.admit(), Void(SampleId(0, index, 0), f"reason {index}"))
        with pytest.raises(UserError, match="reason 2"):
            await buffer.take(2, policy_version=0)

    asyncio.run(scenario())
