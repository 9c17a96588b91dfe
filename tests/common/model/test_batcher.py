"""The batcher: requests that share a pass, its size, and errors in it."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from common.model.batcher import Batcher
from tests.fakes import OWN_TAGS, metered


def make_batcher(run, *, max_tokens: int = 100, window_s: float = 0.01) -> Batcher:
    return Batcher(
        partial(asyncio.to_thread, run), num_tokens=lambda item: item, max_tokens=max_tokens, window_s=window_s
    )


def test_requests_that_arrive_together_share_passes_under_the_token_budget():
    passes = []
    memory = metered()

    def run(items):
        passes.append(list(items))
        return [item * 10 for item in items]

    async def scenario():
        batcher = make_batcher(run)
        return await asyncio.gather(*(batcher.submit(n) for n in (30, 5, 40, 25, 30, 60)))

    assert asyncio.run(scenario()) == [300, 50, 400, 250, 300, 600]
    # Longest first; a pass is padded to its first: 60 | 40 40 | 30 30 30
    assert passes == [[60], [40, 30], [30, 25, 5]]
    assert memory.read("ratchet_batch_rollouts", **OWN_TAGS) == [1, 2, 3]
    assert memory.read("ratchet_batch_tokens", **OWN_TAGS) == [60, 70, 60]


def test_requests_that_arrive_during_a_pass_share_the_next_one():
    passes = []

    async def scenario():
        running = asyncio.Event()
        loop = asyncio.get_running_loop()

        def run(items):
            passes.append(list(items))
            if len(passes) == 1:
                loop.call_soon_threadsafe(running.set)
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result()
            return items

        batcher = make_batcher(run, window_s=0)
        first = asyncio.create_task(batcher.submit(1))
        await running.wait()
        await asyncio.gather(first, *(batcher.submit(n) for n in (4, 3, 2)))
        await batcher.submit(5)  # and it wakes again after it was idle

    asyncio.run(scenario())
    assert passes == [[1], [4, 3, 2], [5]]


def test_an_error_reaches_those_who_shared_the_pass_and_nobody_else():
    def run(items):
        if 60 in items:
            raise ValueError("sixty")
        return items

    async def scenario():
        batcher = make_batcher(run)
        return await asyncio.gather(*(batcher.submit(n) for n in (60, 70, 20)), return_exceptions=True)

    sixty, seventy, twenty = asyncio.run(scenario())
    assert (seventy, twenty) == (70, 20)
    with pytest.raises(ValueError, match="sixty"):
        raise sixty


def test_a_caller_that_gives_up_does_not_disturb_the_others():
    async def scenario():
        batcher = make_batcher(lambda items: items)
        impatient = asyncio.create_task(batcher.submit(1))
        patient = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        impatient.cancel()
        return await patient

    assert asyncio.run(scenario()) == 2


def test_a_pass_that_waits_lets_the_loop_go_on_and_never_meets_another():
    running, most = 0, 0

    async def run(items):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return [-item for item in items]

    async def scenario():
        batcher = Batcher(run, num_tokens=lambda item: item, max_tokens=10, window_s=0)
        beats = 0

        async def heart():
            nonlocal beats
            while True:
                await asyncio.sleep(0.001)
                beats += 1

        heartbeat = asyncio.create_task(heart())
        found = await asyncio.gather(*(batcher.submit(n) for n in (9, 8, 7, 6)))
        heartbeat.cancel()
        return found, beats

    found, beats = asyncio.run(scenario())
    assert found == [-9, -8, -7, -6]
    assert most == 1
    assert beats >= 4
