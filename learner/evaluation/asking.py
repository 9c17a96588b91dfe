"""Many questions to a policy at once, whose answers are kept batch by batch. Runs in the driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from common.types import Prompt, SampleId
from learner.loop.answers import Answered

BATCH = 64  # answers that are kept together
EVERY_S = 5.0  # ... or those of this many seconds: a kill costs at most these


def questions(prompts: Iterable[Prompt], samples: int, known: set[SampleId]) -> list[Prompt]:
    """Every prompt `samples` times, without the known answers: first all prompts once, then all of them again. The
    sample id, and with it the seed of the answer, names prompt and sample."""
    asked = [
        replace(prompt, sample_id=prompt.sample_id._replace(replica=sample))
        for sample in range(samples)
        for prompt in prompts
    ]
    return [prompt for prompt in asked if prompt.sample_id not in known]


async def ask_all(
    asked: Iterable[Prompt],
    ask: Callable[[Prompt], Awaitable[Answered]],
    keep: Callable[[list[Answered]], None],
    *,
    at_once: int,
    batch: int = BATCH,
) -> None:
    """Asks all, `at_once` at the same time, and hands the answers to `keep` in batches. Waits for free places, then for
    the last answers. `keep` also gets the answers that had come before an error or a cancellation."""
    free, kept_at = asyncio.Semaphore(at_once), time.monotonic()
    come: list[Answered] = []

    def keep_all() -> None:
        nonlocal come, kept_at
        answers, come, kept_at = come, [], time.monotonic()
        if answers:
            keep(answers)

    async def one(prompt: Prompt) -> None:
        answer = await ask(prompt)
        come.append(answer)  # into the list of now: an answer that was kept meanwhile began another one
        free.release()
        if len(come) >= batch or time.monotonic() - kept_at > EVERY_S:
            keep_all()

    try:
        async with asyncio.TaskGroup() as answering:
            for prompt in asked:
                await free.acquire()
                answering.create_task(one(prompt))
    except ExceptionGroup as group:  # many may fail for one reason; the first error says it
        raise group.exceptions[0] from None
    finally:
        keep_all()
