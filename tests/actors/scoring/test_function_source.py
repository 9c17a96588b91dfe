"""Reward functions as sources, in threads: what a bad call costs."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from actors.scoring.function_source import FunctionSource
from actors.scoring.function_threads import MAX_LEFT_BEHIND
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig
from common.errors import UserError
from common.types import RawScore, RewardInput
from common.user_code.errors import UserCodeError

MODULE = "tests.actors.scoring.test_function_source"
ANSWER = RewardInput("question", "yes", 2, "stop", {})

let_go = threading.Event()
batches: list[int] = []
running: list[int] = []


def by_prompt(answer: RewardInput) -> float:
    """A grader that fails on some answers."""
    if answer.prompt == "hangs":
        let_go.wait(20)
    if answer.prompt == "exits":
        raise SystemExit(3)
    if answer.prompt == "interrupts":
        raise KeyboardInterrupt
    return float(len(answer.prompt))


async def leave() -> None:
    raise SystemExit(4)


async def by_prompt_async(answer: RewardInput) -> float:
    running.append(1)
    peaks.append(len(running))
    try:
        if answer.prompt == "waits":
            await asyncio.Event().wait()
        if answer.prompt == "blocks":
            let_go.wait(20)
        if answer.prompt == "exits":
            raise SystemExit(3)
        if answer.prompt == "exits in a child":
            await asyncio.gather(asyncio.sleep(0), leave())
        await asyncio.sleep(0.01)
    finally:
        running.pop()
    return float(len(answer.prompt))


peaks: list[int] = []


def listed(answers: list[RewardInput]) -> list[float]:
    batches.append(len(answers))
    if any(answer.prompt == "bad" for answer in answers):
        raise ValueError("one of them is bad")
    threading.Event().wait(0.005)
    return [float(len(answer.prompt)) for answer in answers]


def noargs() -> float:
    return 1.0


@pytest.fixture
def module():
    """This module as sources import it. pytest runs another copy of it."""
    import tests.actors.scoring.test_function_source as module

    module.let_go.clear()
    for record in (module.batches, module.running, module.peaks):
        record.clear()
    yield module
    module.let_go.set()


def source(function: str, *, call_timeout_s: float = 10.0, **settings) -> FunctionSource:
    path = function if ":" in function else f"{MODULE}:{function}"
    cfg = FunctionSourceConfig(name="s", function=path, **settings)
    return FunctionSource(cfg, SourcesConfig(sources=(cfg,), call_timeout_s=call_timeout_s))


def ask(function: str, prompts: list[str], **settings) -> list[RawScore | BaseException]:
    """The result or error of each prompt. All are asked at once."""

    async def scenario():
        asked = source(function, **settings)
        try:
            calls = (asked(replace(ANSWER, prompt=prompt)) for prompt in prompts)
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
        finally:
            asked.close()

    return asyncio.run(scenario())


def shown(results: list[RawScore | BaseException]) -> list[float | str]:
    return [result.score if isinstance(result, RawScore) else str(result) for result in results]


# In threads


def test_an_exit_or_interrupt_costs_its_own_answer_only(module):
    found = shown(ask("by_prompt", ["a", "exits", "bb", "interrupts", "ccc"]))
    assert [found[0], found[2], found[4]] == [1.0, 2.0, 3.0]
    assert found[1].startswith("raised SystemExit: 3 (test_function_source.py, line ")
    assert found[3].startswith("raised KeyboardInterrupt (test_function_source.py, line ")


def test_a_call_past_its_limit_costs_its_own_answer_only(module):
    found = shown(ask("by_prompt", ["a", "hangs", "bb"], call_timeout_s=1))
    assert found == [1.0, "took longer than call_timeout_s (1 s)", 2.0]


def test_with_too_many_endless_calls_no_further_call_is_made(module):
    found = shown(ask("by_prompt", ["hangs"] * MAX_LEFT_BEHIND + ["a"], call_timeout_s=0.05))
    assert found[:-1] == ["took longer than call_timeout_s (0.05 s)"] * MAX_LEFT_BEHIND
    assert found[-1].startswith(f"was not called: {MAX_LEFT_BEHIND} earlier calls of it still run past call_timeout_s")
    assert 'isolation = "process"' in found[-1]


def test_when_late_calls_end_further_calls_are_made(module):
    async def scenario():
        asked = source("by_prompt", call_timeout_s=0.05)
        hanging = (asked(replace(ANSWER, prompt="hangs")) for _ in range(MAX_LEFT_BEHIND))
        await asyncio.gather(*hanging, return_exceptions=True)
        with pytest.raises(UserCodeError, match="was not called"):
            await asked(ANSWER)
        module.let_go.set()
        deadline = time.monotonic() + 10
        while True:
            try:
                return await asked(ANSWER)
            except UserCodeError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

    assert asyncio.run(scenario()).score == len(ANSWER.prompt)


def test_calls_of_an_async_function_overlap_up_to_the_concurrency(module):
    found = ask("by_prompt_async", ["x" * n for n in range(1, 13)], concurrency=4)
    assert shown(found) == [float(n) for n in range(1, 13)]
    assert max(module.peaks) == 4


def test_an_async_call_past_its_limit_costs_its_own_answer_only(module):
    found = shown(ask("by_prompt_async", ["a", "waits", "exits", "bb"], call_timeout_s=1))
    assert [found[0], found[1], found[3]] == [1.0, "took longer than call_timeout_s (1 s)", 2.0]
    assert found[2].startswith("raised SystemExit: 3")
    deadline = time.monotonic() + 10
    while module.running:  # until its finally clause has run in the other thread
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_exit_in_a_task_of_an_async_function_costs_its_own_answer_only(module):
    async def scenario():
        asked = source("by_prompt_async", call_timeout_s=5)
        prompts = ("a", "exits in a child", "bb")
        together = await asyncio.gather(*(asked(replace(ANSWER, prompt=p)) for p in prompts), return_exceptions=True)
        later = await asked(replace(ANSWER, prompt="later"))
        asked.close()
        return [*together, later]

    first, exited, second, later = shown(asyncio.run(scenario()))
    assert [first, second, later] == [1.0, 2.0, 5.0]
    assert exited.startswith("raised SystemExit: 4 (test_function_source.py, line ")


def test_a_blocking_async_call_does_not_block_later_calls(module, monkeypatch):
    monkeypatch.setattr("actors.scoring.function_threads.ANSWERS_WITHIN_S", 0.1)

    async def scenario():
        asked = source("by_prompt_async", call_timeout_s=1)
        with pytest.raises(UserCodeError, match="took longer"):
            await asked(replace(ANSWER, prompt="blocks"))
        try:
            return await asyncio.wait_for(asked(ANSWER), 10)
        finally:
            module.let_go.set()
            while module.running:
                await asyncio.sleep(0.01)

    assert asyncio.run(scenario()).score == len(ANSWER.prompt)


def test_a_function_that_takes_a_list_gets_what_waits_up_to_batch(module):
    assert shown(ask("listed", ["x" * n for n in range(10)], batch=4)) == [float(n) for n in range(10)]
    assert module.batches == [4, 4, 2]


def test_when_a_call_with_several_answers_fails_each_is_tried_alone(module):
    found = shown(ask("listed", ["a", "bad", "bb"]))
    assert [found[0], found[2]] == [1.0, 2.0]
    assert found[1].startswith("raised ValueError: one of them is bad (test_function_source.py, line ")
    assert module.batches == [3, 1, 1, 1]


def test_a_function_that_cannot_take_an_answer_is_refused():
    with pytest.raises(
        UserError, match=r"reward source s \(tests.*:noargs\) takes \(\) -> float, but is called with one"
    ):
        source("noargs")
