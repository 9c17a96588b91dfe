"""The choice of the replica for a call, and the order of calls that wait."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from actors.pool.routing import Router
from tests.fakes import pending


def test_the_least_loaded_by_cost_gets_the_call():
    async def scenario():
        router = Router(in_flight=10)
        for replica in (1, 2, 3):
            router.open(replica)
        assert [await router.acquire(cost) for cost in (5, 3, 4)] == [1, 2, 3]
        # Loads 5, 3, 4: the next goes to 2 (3 + 9 = 12), then 3 (4 + 2 = 6), then 1.
        assert [await router.acquire(cost) for cost in (9, 2, 1)] == [2, 3, 1]
        router.release(2, 9)  # 6, 3, 6
        assert await router.acquire(1) == 2
        assert (router.cost(1), router.cost(2), router.cost(3)) == (6, 4, 6)

    asyncio.run(scenario())


def test_calls_beyond_in_flight_wait_and_are_served_in_order():
    async def scenario():
        router = Router(in_flight=2)
        router.open(1)
        assert [await router.acquire(1), await router.acquire(100)] == [1, 1]
        third, fourth = await pending(router.acquire(1)), await pending(router.acquire(1))
        assert router.num_waiting == 2
        router.release(1, 1)
        assert await third == 1
        assert not fourth.done()
        router.open(2)
        assert await fourth == 2

    asyncio.run(scenario())


def test_a_closed_replica_gets_no_calls_and_a_forgotten_one_has_none():
    async def scenario():
        router = Router(in_flight=2)
        router.open(1)
        await router.acquire(7)
        router.close(1)
        waiting = await pending(router.acquire(1))
        router.release(1, 7)  # it has room, but is closed
        await asyncio.sleep(0)
        assert not waiting.done()
        router.open(1)
        assert await waiting == 1
        router.forget(1)
        router.release(1, 1)  # the caller releases it later
        assert (router.calls(1), router.cost(1)) == (0, 0)

    asyncio.run(scenario())


def test_the_turn_of_a_cancelled_caller_goes_to_the_next():
    async def scenario():
        router = Router(in_flight=1)
        router.open(1)
        await router.acquire(1)
        first, second = await pending(router.acquire(1)), await pending(router.acquire(1))
        router.release(1, 1)  # now it is the first caller's turn
        first.cancel()  # cancelled before it could take it
        assert await second == 1
        assert router.calls(1) == 1

    asyncio.run(scenario())


def test_after_fail_every_caller_gets_the_error():
    async def scenario():
        router = Router(in_flight=1)
        waiting = await pending(router.acquire(1))
        router.fail(RuntimeError("too few"))
        with pytest.raises(RuntimeError, match="too few"):
            await waiting
        with pytest.raises(RuntimeError, match="too few"):
            await router.acquire(1)

    asyncio.run(scenario())


async def loaded(*costs: int, in_flight: int = 10) -> Router:
    """A router whose replicas 1, 2, ... have one call of these costs each."""
    router = Router(in_flight)
    for replica, cost in enumerate(costs, 1):
        router.open(replica)
        assert await router.acquire(cost) == replica
    return router


def test_a_preferred_replica_is_passed_over_when_it_is_overloaded():
    async def scenario():
        # The least loaded one has 10, and the call costs 5: up to 2 * 10 + 5 = 25 the preferred one gets it.
        assert await (await loaded(25, 10, 11)).acquire(5, prefer=1) == 1
        assert await (await loaded(26, 10, 11)).acquire(5, prefer=1) == 2
        router = await loaded(25, 10, 11)
        assert await router.acquire(5) == 2
        assert [await router.acquire(1, prefer=3), await router.acquire(1)] == [3, 3]  # 25, 15, 11: then 12, then 13
        assert (router.cost(1), router.cost(2), router.cost(3)) == (25, 15, 13)

    asyncio.run(scenario())


def test_a_preferred_replica_that_is_full_closed_or_gone_is_passed_over():
    async def scenario():
        assert await (await loaded(2, 3)).acquire(1, prefer=2) == 2
        assert await (await loaded(2, 3, in_flight=2)).acquire(1, prefer=2) == 2
        router = await loaded(2, 3, in_flight=2)
        assert [await router.acquire(1, prefer=2), await router.acquire(1, prefer=2)] == [2, 1]  # 2 is full
        for end in (Router.close, Router.forget):
            router = await loaded(2, 3)
            end(router, 2)
            assert await router.acquire(1, prefer=2) == 1
        assert await (await loaded(2, 3)).acquire(1, prefer=99) == 1  # never seen here

    asyncio.run(scenario())


def test_a_waiting_call_takes_the_first_room_on_any_replica():
    async def scenario():
        router = await loaded(5, 5, in_flight=1)
        first, second = await pending(router.acquire(1, prefer=2)), await pending(router.acquire(1, prefer=1))
        router.release(1, 5)
        assert await first == 1
        router.release(2, 5)
        assert await second == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_preferred_or_the_least_loaded_open_replica_with_room(seed):
    """Compared with a plain search, over random operations."""

    async def scenario():
        chance = random.Random(seed)
        router, in_flight = Router(in_flight=3), 3
        is_open: set[int] = set()
        held: list[tuple[int, int]] = []
        outcomes = Counter[tuple[bool, bool]]()  # whether a replica was preferred, whether it got the call
        for _ in range(3000):
            replica = chance.randrange(1, 8)
            action = chance.random()
            if action < 0.05:
                router.open(replica)
                is_open.add(replica)
            elif action < 0.08:
                router.close(replica)
                is_open.discard(replica)
            elif action < 0.5 and held:
                router.release(*held.pop(chance.randrange(len(held))))
            else:
                calls = {r: sum(h[0] == r for h in held) for r in is_open}
                costs = {r: sum(h[1] for h in held if h[0] == r) for r in is_open}
                if free := [r for r in is_open if calls[r] < in_flight]:
                    cost = chance.randrange(1, 50)
                    prefer = chance.choice([None, chance.randrange(1, 10)])
                    chosen = await asyncio.wait_for(router.acquire(cost, prefer), 1)
                    least = min(costs[r] for r in free)
                    kept = prefer in free and costs[prefer] - cost <= 2 * least
                    assert chosen == prefer if kept else costs[chosen] == least
                    outcomes[prefer is not None, kept] += 1
                    held.append((chosen, cost))
        assert min(outcomes[True, False], outcomes[True, True], outcomes[False, False]) > 100
        assert len(router._heap) <= 8 * 7 + 64 + 1

    asyncio.run(scenario())
