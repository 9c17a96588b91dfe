"""Asks a policy many questions at once, and saves its answers batch by batch. Runs in the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from common.types import Prompt, SampleId
from learner.loop.answers import Answered

BATCH = 64  # answers that are saved together: a kill loses fewer answers than this ...
EVERY_S = 5.0  # ... and no answer that is older than this


def questions(prompts: Iterable[Prompt], samples: int, known: set[SampleId]) -> list[Prompt]:
    """Every prompt `samples` times, without the known answers: first all prompts once, then all of them again. The
    sample id has the prompt and the sample, and the seed of the answer follows from it."""
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
    """Asks all, `at_once` at the same time, and calls `keep` with the answers in batches. Waits for free places, then
    for the last answers. `keep` gets the answers so far every EVERY_S seconds, and after an error or a
    cancellation."""
    free = asyncio.Semaphore(at_once)
    unsaved: list[Answered] = []

    def save() -> None:
        nonlocal unsaved
        answers, unsaved = unsaved, []
        if answers:
            keep(answers)

    async def save_in_time() -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            save()

    async def one(prompt: Prompt) -> None:
        answer = await ask(prompt)
        unsaved.append(answer)  # only now: `save` may have replaced the list during the await
        free.release()
        if len(unsaved) >= batch:
            save()

    try:
        async with asyncio.TaskGroup() as saving:
            timer = saving.create_task(save_in_time())
            async with asyncio.TaskGroup() as answering:
                for prompt in asked:
                    await free.acquire()
                    answering.create_task(one(prompt))
            timer.cancel()
    except ExceptionGroup as group:  # many may fail for one reason; the first error names it
        error: Exception = group
        while isinstance(error, ExceptionGroup):  # one group for each of the two above
            error = error.exceptions[0]
        raise error from None
    finally:
        save()
