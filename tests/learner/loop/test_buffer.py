"""Slots, order of admission, voids and staleness."""

from __future__ import annotations

import asyncio
import random

import pytest

from common.errors import RolloutLostError, UserError
from common.types import SampleId, Void
from learner.loop.buffer import RolloutBuffer
from tests.fakes import fetch_scored, make_scored, pending


def make_buffer(*args, **settings) -> RolloutBuffer:
    return RolloutBuffer(*args, fetch=fetch_scored, **settings)


def ids(rows) -> list[int]:
    return [row.rollout.prompt.sample_id.prompt for row in rows]


def test_admission_waits_until_slots_are_released():
    async def scenario():
        buffer = make_buffer(2, 0)
        tickets = [await buffer.admit(), await buffer.admit()]
        third = await pending(buffer.admit())
        for ticket in tickets:
            await buffer.put(ticket, make_scored(ticket, [4, 1]))
        await buffer.take(2, policy_version=0)
        assert not third.done()  # taken, but the generators do not hold the new weights yet
        await buffer.release(2)
        assert await third == 3

    asyncio.run(scenario())


def test_a_batch_waits_for_the_oldest_rather_than_taking_the_fastest():
    async def scenario():
        buffer = make_buffer(2, 1)
        first, second, third, _ = [await buffer.admit() for _ in range(4)]
        await buffer.put(second, make_scored(second, [4, 1]))
        await buffer.put(third, make_scored(third, [4, 1]))
        batch = await pending(buffer.take(2, policy_version=0))
        await buffer.put(first, make_scored(first, [4, 1]))
        cut = await batch
        assert ids(cut.experience) == [first, second]
        assert cut.voids == []

    asyncio.run(scenario())


def test_a_rollout_lost_before_the_cut_is_voided_and_replaced():
    """Tokens are fetched only when a batch is cut. By then they may be lost with their node."""

    lost = {2}

    async def fetch(rows):
        fetched = zip(rows, await fetch_scored(rows), strict=True)
        gone = RolloutLostError("its node is gone")
        return [gone if row.ref.sample_id.prompt in lost else there for row, there in fetched]

    async def scenario():
        buffer = RolloutBuffer(2, 1, fetch=fetch)
        for ticket in [await buffer.admit() for _ in range(3)]:
            await buffer.put(ticket, make_scored(ticket, [4, 1]))
        batch = await buffer.take(2, policy_version=0)
        assert ids(batch.experience) == [1, 3]
        assert batch.voids == [Void(SampleId(0, 2, 0), "its node is gone", asked_again=True)]
        await asyncio.wait_for(buffer.admit(), 1)  # one slot was never used, one was given back
        await asyncio.wait_for(buffer.admit(), 1)
        await pending(buffer.admit())

    asyncio.run(scenario())


def test_a_rollout_that_is_asked_again_gives_its_bytes_back():
    async def scenario():
        row = make_scored(1, [4, 1])
        # Room for the next batch and one rollout more.
        buffer = make_buffer(1, 9, max_bytes=2 * row.num_bytes, rollout_bytes=row.num_bytes)
        await buffer.put(await buffer.admit(), make_scored(1, [4, 1], version=0))
        second = await buffer.admit()
        waiting = await pending(buffer.admit())
        taking = asyncio.create_task(buffer.take(1, policy_version=99))  # the first one is too old by now
        assert await asyncio.wait_for(waiting, 1) == 3
        await buffer.put(second, make_scored(2, [4, 1], version=99))
        assert ids((await taking).experience) == [2]
        assert buffer._bytes == 0

    asyncio.run(scenario())


def test_a_fetch_that_fails_otherwise_is_an_error_and_takes_nothing_out():
    async def scenario():
        failing = [True]

        async def fetch(rows):
            if failing[0]:
                raise ValueError("broken")
            return await fetch_scored(rows)

        buffer = RolloutBuffer(1, 0, fetch=fetch)
        await buffer.put(await buffer.admit(), make_scored(1, [4, 1]))
        with pytest.raises(ValueError, match="broken"):
            await buffer.take(1, policy_version=0)
        failing[0] = False
        assert ids((await buffer.take(1, policy_version=0)).experience) == [1]

    asyncio.run(scenario())


def test_a_void_gives_its_slot_back_and_is_reported_once():
    async def scenario():
        buffer = make_buffer(1, 0)
        void = Void(SampleId(0, 7, 0), "broken")
        await buffer.put(await buffer.admit(), void)
        ticket = await buffer.admit()
        await buffer.put(ticket, make_scored(ticket, [4, 1]))
        batch = await buffer.take(1, policy_version=0)
        assert (len(batch.experience), batch.voids) == (1, [void])

    asyncio.run(scenario())


def test_rollouts_whose_oldest_token_is_too_old_are_voided_at_the_cut():
    async def scenario():
        buffer = make_buffer(1, 1)
        stale, fresh = await buffer.admit(), await buffer.admit()
        await buffer.put(stale, make_scored(stale, [4, 5, 1], version=0))
        await buffer.put(fresh, make_scored(fresh, [4, 5, 1], version=1))
        batch = await buffer.take(1, policy_version=2)
        assert ids(batch.experience) == [fresh]
        assert [(void.sample_id.prompt, void.asked_again) for void in batch.voids] == [(stale, True)]
        assert "1 versions" in batch.voids[0].reason
        assert await buffer.admit() == 3  # the void's slot is free again

    asyncio.run(scenario())


def test_too_many_voids_end_the_wait():
    async def scenario():
        buffer = make_buffer(2, 0, max_void_share=0.5)
        for index in range(3):  # 3 of 3 + 2 is more than half
            await buffer.put(await buffer.admit(), Void(SampleId(0, index, 0), f"reason {index}"))
        with pytest.raises(UserError, match="reason 2"):
            await buffer.take(2, policy_version=0)

    asyncio.run(scenario())


def test_rollouts_that_are_merely_old_do_not_count_as_broken():
    async def scenario():
        # 3 old ones with the 2 wanted would be above the share; 1 broken one is not.
        buffer = make_buffer(2, 1, max_void_share=0.4)
        tickets = [await buffer.admit() for _ in range(4)]
        for ticket, version in zip(tickets, (0, 0, 0, 2), strict=True):
            await buffer.put(ticket, make_scored(ticket, [4, 1], version=version))
        taking = asyncio.create_task(buffer.take(2, policy_version=2))
        await buffer.put(await buffer.admit(), Void(SampleId(0, 99, 0), "broken"))  # in the place of an old one
        last = await buffer.admit()
        await buffer.put(last, make_scored(last, [4, 1], version=1))
        batch = await taking
        assert ids(batch.experience) == [tickets[3], last]
        voids = [(void.sample_id.prompt, void.asked_again) for void in batch.voids]
        assert voids == [(ticket, True) for ticket in tickets[:3]] + [(99, False)]

    asyncio.run(scenario())


def test_voids_are_compared_with_all_rollouts_since_the_last_cut():
    async def scenario():
        buffer = make_buffer(2, 3, max_void_share=0.5)
        for ticket in [await buffer.admit() for _ in range(2)]:
            await buffer.put(ticket, make_scored(ticket, [4, 1]))
        await buffer.take(2, policy_version=0)
        for index in range(4):  # 4 void and 5 scored while the learner learns: more than 2 of 4, but not half
            await buffer.put(await buffer.admit(), Void(SampleId(0, 90 + index, 0), "broken"))
        for ticket in [await buffer.admit() for _ in range(5)]:
            await buffer.put(ticket, make_scored(ticket, [4, 1]))
        assert len((await buffer.take(2, policy_version=1)).experience) == 2
        for index in range(3):  # since that cut
            await buffer.put(await buffer.admit(), Void(SampleId(0, 95 + index, 0), f"reason {index}"))
        with pytest.raises(UserError, match="reason 2"):
            await buffer.take(2, policy_version=2)

    asyncio.run(scenario())


def test_times_are_split_into_generating_and_waiting_in_the_buffer():
    now = [0.0]

    async def scenario():
        buffer = make_buffer(2, 0, clock=lambda: now[0])
        first, second = await buffer.admit(), await buffer.admit()
        now[0] = 3.0
        await buffer.put(first, make_scored(first, [4, 1]))
        now[0] = 5.0
        await buffer.put(second, make_scored(second, [4, 1]))  # from here on nothing is in flight
        now[0] = 6.0
        stats = (await buffer.take(2, policy_version=0)).stats
        # 3 and 5 seconds of generation, 3 and 1 in the buffer.
        assert stats == {"staleness/generating_s": 4.0, "staleness/buffered_s": 2.0, "wait/generators_s": 1.0}
        now[0] = 10.0
        await buffer.release(2)
        ticket = await buffer.admit()
        now[0] = 11.0
        await buffer.put(ticket, make_scored(ticket, [4, 1], version=1))
        stats = (await buffer.take(1, policy_version=1)).stats
        assert stats == {"staleness/generating_s": 1.0, "staleness/buffered_s": 0.0, "wait/generators_s": 4.0}

    asyncio.run(scenario())


def test_long_rollouts_hold_back_those_that_the_next_batch_does_not_need():
    row = make_scored(0, [4] * 100)
    # Room for three finished ones; one in flight counts as much.
    room = 3 * row.num_bytes

    async def scenario():
        buffer = make_buffer(2, 3, max_bytes=room, rollout_bytes=row.num_bytes)
        tickets = [await buffer.admit() for _ in range(3)]
        fourth = await pending(buffer.admit())
        await buffer.put(tickets[0], make_scored(1, [4] * 100))
        await buffer.put(tickets[1], make_scored(2, [4]))  # a short one leaves room behind, but not for a long one
        for _ in range(5):
            await asyncio.sleep(0)
        assert not fourth.done()
        await buffer.take(2, policy_version=0)
        assert await fourth == 4

    asyncio.run(scenario())


def test_no_more_is_admitted_than_the_batches_to_come_hold():
    async def scenario():
        buffer = make_buffer(2, 1, wanted=4)
        for ticket in [await buffer.admit() for _ in range(3)]:
            await buffer.put(ticket, make_scored(ticket, [4, 1]))
        await buffer.put(await buffer.admit(), Void(SampleId(0, 9, 0), "broken"))
        fourth = await buffer.admit()  # in the place of the void
        await buffer.take(2, policy_version=0)
        await buffer.release(2)
        await pending(buffer.admit())  # slots are free, but nothing more is wanted
        await buffer.put(fourth, make_scored(fourth, [4, 1]))
        assert len((await buffer.take(2, policy_version=1)).experience) == 2

    asyncio.run(scenario())


def test_the_next_batch_is_admitted_however_large_it_is():
    async def scenario():
        buffer = make_buffer(2, 1, max_bytes=1, rollout_bytes=10)
        tickets = [await buffer.admit(), await buffer.admit()]
        third = await pending(buffer.admit())
        for ticket in tickets:
            await buffer.put(ticket, make_scored(ticket, [4] * 50))
        assert len((await buffer.take(2, policy_version=0)).experience) == 2
        assert await third == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_in_any_order_of_completion_staleness_is_bounded_and_slots_return(max_staleness, seed):
    """Producers take random times, some end with a void, and the consumer publishes late."""
    rng, count, steps = random.Random(seed), 3, 12
    version, outstanding, most = 0, 0, 0

    async def scenario():
        nonlocal version, outstanding, most
        buffer = make_buffer(count, max_staleness)

        async def rollout(ticket):
            nonlocal outstanding
            born = version
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            void = rng.random() < 0.2
            outstanding -= void
            row = make_scored(ticket, [4, 1], version=born)
            await buffer.put(ticket, Void(row.ref.sample_id, "chance") if void else row)

        async def produce():
            nonlocal outstanding, most
            async with asyncio.TaskGroup() as tasks:
                while True:
                    ticket = await buffer.admit()
                    outstanding += 1
                    most = max(most, outstanding)
                    tasks.create_task(rollout(ticket))

        producer = asyncio.create_task(produce())
        seen = []
        for step in range(steps):
            batch = await buffer.take(count, policy_version=step)
            assert all(step - row.rollout.policy_versions.min() <= max_staleness for row in batch.experience)
            assert not any(void.asked_again for void in batch.voids)  # the budget alone keeps them young
            seen += ids(batch.experience) + [void.sample_id.prompt for void in batch.voids]
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            version = step + 1
            outstanding -= count
            most = 0  # so that a slot lost on the way is missed at the end
            await buffer.release(count)
        for _ in range(200):
            await asyncio.sleep(0)
        assert not producer.done()
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)
        assert len(seen) == len(set(seen))

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert most == (max_staleness + 1) * count
