"""Reward functions in threads of the reward process. Runs in each reward process.

A thread cannot be ended from outside. One whose call passed its limit is left behind, and a new one takes its place.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any, Protocol

from common.reward_input import RewardInput
from common.user_code.calls import Form, Outcome, UserCodeError, call, call_async

MOST_LEFT_BEHIND = 8  # threads whose calls go on past their limit, before no further call is begun
ANSWERS_WITHIN_S = 2  # a thread of async functions that does not answer for this long is blocked by one of them


class CallThread:
    """A thread that makes one call at a time."""

    def __init__(self, function: Callable[..., Any], form: Form) -> None:
        self._function, self._form = function, form
        self._calls: queue.SimpleQueue[tuple[Sequence[RewardInput], Future[list[Outcome]]] | None] = queue.SimpleQueue()
        self._thread = Thread(target=self._run, name="reward function", daemon=True)
        self._thread.start()

    def submit(self, answers: Sequence[RewardInput]) -> Future[list[Outcome]]:
        future: Future[list[Outcome]] = Future()
        self._calls.put((answers, future))
        return future

    async def blocked(self) -> bool:
        """After a call that passed its limit: that call still has the thread."""
        return True

    def leave(self) -> None:
        """It ends when its call does."""
        self._calls.put(None)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            answers, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(self._function, self._form, answers))
            except BaseException as error:
                future.set_exception(error)


class LoopThread:
    """A thread with an event loop of its own, where calls of an async function overlap."""

    def __init__(self, function: Callable[..., Any], form: Form) -> None:
        self._function, self._form = function, form
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, name="async reward function", daemon=True)
        self._thread.start()

    def submit(self, answers: Sequence[RewardInput]) -> Future[list[Outcome]]:
        return asyncio.run_coroutine_threadsafe(call_async(self._function, self._form, answers), self._loop)

    async def blocked(self) -> bool:
        """After a call that passed its limit: it did not give way when it was cancelled."""
        answer: Future[None] = Future()
        self._loop.call_soon_threadsafe(_resolve, answer)
        try:
            await asyncio.wait_for(asyncio.wrap_future(answer), ANSWERS_WITHIN_S)
        except TimeoutError:
            return True
        return False

    def leave(self) -> None:
        """It ends when the call that blocks it does; what else it has is cancelled."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        self._loop.run_forever()
        calls = asyncio.all_tasks(self._loop)
        for call_ in calls:
            call_.cancel()
        if calls:
            self._loop.run_until_complete(asyncio.wait(calls))
        self._loop.close()


def _resolve(answer: Future[None]) -> None:
    if answer.set_running_or_notify_cancel():
        answer.set_result(None)


class Runner(Protocol):
    """Calls a user's function."""

    form: Form

    async def run(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        """One call, with one answer or, if the function takes a list, several: an Outcome for each. Raises
        UserCodeError when the call as a whole fails or takes longer than its limit."""

    def close(self) -> None:
        """Ends threads and processes."""


class ThreadRunner:
    """A Runner in threads of this process."""

    def __init__(self, function: Callable[..., Any], form: Form, *, limit_s: float) -> None:
        self.form = form
        self._limit_s = limit_s
        self._make = lambda: (LoopThread if form.is_async else CallThread)(function, form)
        self._thread: CallThread | LoopThread = self._make()
        self._left_behind: list[CallThread | LoopThread] = []

    async def run(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        if len(self._left_behind) >= MOST_LEFT_BEHIND:
            raise UserCodeError(
                f"was not called: {len(self._left_behind)} earlier calls of it go on past call_timeout_s "
                f'({self._limit_s:g} s), and threads cannot be ended; isolation = "process" ends such calls'
            )
        thread, limit = self._thread, asyncio.timeout(self._limit_s)
        future = asyncio.wrap_future(thread.submit(answers))
        try:
            async with limit:
                # Not awaited itself: if its thread is left behind it is cancelled, which would cancel the caller.
                await asyncio.wait([future])
        except TimeoutError:
            future.cancel()
            if await thread.blocked():
                self._replace(thread)
            raise too_long(self._limit_s) from None
        except asyncio.CancelledError:
            future.cancel()
            raise
        if future.cancelled():
            raise UserCodeError("was cancelled: another call of this async function blocked their thread")
        return future.result()

    def close(self) -> None:
        self._thread.leave()

    def _replace(self, thread: CallThread | LoopThread) -> None:
        """By a new one, unless another call has done so."""
        if thread is self._thread:
            thread.leave()
            self._left_behind.append(thread)
            self._thread = self._make()


def too_long(limit_s: float) -> UserCodeError:
    return UserCodeError(f"took longer than call_timeout_s ({limit_s:g} s)")
