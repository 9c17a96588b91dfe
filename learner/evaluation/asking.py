"""Asks a policy many questions at once, and saves its answers batch by batch. Runs in the driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from common.types import Prompt, SampleId
from learner.loop.answers import Answered

BATCH = 64  # answers that are saved together
EVERY_S = 5.0  # the first answer after this many seconds saves all so far


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
    for the last answers. After an error or a cancellation, `keep` still gets the answers so far."""
    free, saved_at = asyncio.Semaphore(at_once), time.monotonic()
    unsaved: list[Answered] = []

    def save() -> None:
        nonlocal unsaved, saved_at
        answers, unsaved, saved_at = unsaved, [], time.monotonic()
        if answers:
            keep(answers)

    async def one(prompt: Prompt) -> None:
        answer = await ask(prompt)
        unsaved.append(answer)  # only now: `save` may have replaced the list during the await
        free.release()
        if len(unsaved) >= batch or time.monotonic() - saved_at > EVERY_S:
            save()

    try:
        async with asyncio.TaskGroup() as answering:
            for prompt in asked:
                await free.acquire()
                answering.create_task(one(prompt))
    except ExceptionGroup as group:  # many may fail for one reason; the first error says it
        raise group.exceptions[0] from None
    finally:
        save()
