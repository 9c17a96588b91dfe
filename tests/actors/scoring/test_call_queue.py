"""The queue in front of functions and services: which answers share a call, and how many calls overlap."""

from __future__ import annotations

import asyncio

from actors.scoring.call_queue import CallQueue
from common.futures import settle
from common.types import RewardInput


def answers(*prompts: str) -> list[RewardInput]:
    return [RewardInput(prompt, "", 0, "stop", {}) for prompt in prompts]


def test_calls_hold_up_to_batch_answers_and_up_to_concurrency_overlap():
    async def scenario():
        calls, running, peak = [], 0, 0

        async def call(waiting):
            nonlocal running, peak
            calls.append("".join(answer.prompt for answer, _ in waiting))
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0)
            running -= 1
            settle(waiting, [answer.prompt.upper() for answer, _ in waiting])

        queue = CallQueue(call, batch=3, concurrency=2)
        return await asyncio.gather(*map(queue.submit, answers(*"abcdefgh"))), calls, peak

    assert asyncio.run(scenario()) == (list("ABCDEFGH"), ["abc", "def", "gh"], 2)


def test_an_answer_whose_caller_was_cancelled_is_in_no_call():
    async def scenario():
        calls, go_on = [], asyncio.Event()

        async def call(waiting):
            calls.append("".join(answer.prompt for answer, _ in waiting))
            await go_on.wait()
            settle(waiting, [None] * len(waiting))

        queue = CallQueue(call, batch=1, concurrency=1)
        first, second, third = (asyncio.create_task(queue.submit(answer)) for answer in answers(*"abc"))
        while not calls:
            await asyncio.sleep(0)
        second.cancel()
        go_on.set()
        await asyncio.gather(first, third)
        return calls

    assert asyncio.run(scenario()) == ["a", "c"]


def test_an_answer_that_comes_as_the_last_worker_ends_is_served():
    async def scenario():
        async def call(waiting):
            settle(waiting, [answer.prompt for answer, _ in waiting])

        queue = CallQueue(call, batch=1, concurrency=1)
        found = []
        for answer in answers(*"abc"):  # each is submitted in the loop's very turn in which the worker ends
            found.append(await queue.submit(answer))
        return found

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == ["a", "b", "c"]
