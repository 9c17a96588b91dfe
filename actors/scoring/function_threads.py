"""Runs reward functions in threads of the reward process. Runs in each reward replica.

Python cannot end a thread from outside. If a call passes its limit and still blocks its thread, that thread is left
behind, and a new thread serves later calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any

from actors.scoring.function_runner import too_long
from common.reward_input import RewardInput
from common.user_code.calls import CallStyle, call, call_async
from common.user_code.errors import UserCodeError
from common.user_code.event_loops import run_until
from common.user_code.ordered_calls import OrderedCalls
from common.user_code.results import Outcome

MAX_LEFT_BEHIND = 8  # no further call is made while this many threads still run calls past their limit
ANSWERS_WITHIN_S = 2  # if a thread of async functions does not respond for this long, one of them blocks it


class CallThread:
    """A thread that makes one call after another."""

    def __init__(self, function: Callable[..., Any], style: CallStyle) -> None:
        self._function, self._style = function, style
        self._calls = OrderedCalls("reward function")

    def submit(self, answers: Sequence[RewardInput]) -> Future[list[Outcome]]:
        """Starts a call when the earlier ones have ended. The future gets its outcomes or its UserCodeError."""
        return self._calls.submit(call, self._function, self._style, answers)

    async def is_blocked(self) -> bool:
        """True if a call that passed its limit still blocks the thread: here always, because nothing can end a call."""
        return True

    def leave(self) -> None:
        """Makes the thread end when its current call ends."""
        self._calls.leave()

    def is_alive(self) -> bool:
        """False once the thread has ended."""
        return self._calls.is_alive()


class LoopThread:
    """A thread with its own event loop, where calls of an async function overlap. It survives a `sys.exit()` in a task
    that the function starts."""

    def __init__(self, function: Callable[..., Any], style: CallStyle) -> None:
        self._function, self._style = function, style
        self._loop = asyncio.new_event_loop()
        self._leaves = False
        self._thread = Thread(target=self._run, name="async reward function", daemon=True)
        self._thread.start()

    def submit(self, answers: Sequence[RewardInput]) -> Future[list[Outcome]]:
        """Starts a call at once. The future gets its outcomes or its UserCodeError."""
        return asyncio.run_coroutine_threadsafe(call_async(self._function, self._style, answers), self._loop)

    async def is_blocked(self) -> bool:
        """True if a call that passed its limit still blocks the thread. It was cancelled, but continues if it never
        awaits."""
        response: Future[None] = Future()
        self._loop.call_soon_threadsafe(_respond, response)
        try:
            await asyncio.wait_for(asyncio.wrap_future(response), ANSWERS_WITHIN_S)
        except TimeoutError:
            return True
        return False

    def leave(self) -> None:
        """Makes the thread end when the call that blocks it ends. The other calls are then cancelled."""
        self._leaves = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def is_alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        run_until(lambda: self._leaves, self._loop)
        calls = asyncio.all_tasks(self._loop)
        for task in calls:
            task.cancel()
        while waiting := [task for task in calls if not task.done()]:
            with suppress(SystemExit, KeyboardInterrupt):  # of a task that is cancelled
                self._loop.run_until_complete(asyncio.wait(waiting))
        self._loop.close()


def _respond(response: Future[None]) -> None:
    if response.set_running_or_notify_cancel():
        response.set_result(None)


class ThreadRunner:
    """A Runner in threads of this process."""

    def __init__(self, function: Callable[..., Any], style: CallStyle, *, limit_s: float) -> None:
        self.style = style
        self._limit_s = limit_s
        self._make = lambda: (LoopThread if style.is_async else CallThread)(function, style)
        self._thread: CallThread | LoopThread = self._make()
        self._left_behind: list[CallThread | LoopThread] = []

    async def run(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        if len(self._left_behind) >= MAX_LEFT_BEHIND:
            raise UserCodeError(
                f"was not called: {len(self._left_behind)} earlier calls of it still run past call_timeout_s "
                f'({self._limit_s:g} s), and threads cannot be ended; isolation = "process" ends such calls'
            )
        thread, limit = self._thread, asyncio.timeout(self._limit_s)
        future = asyncio.wrap_future(thread.submit(answers))
        try:
            async with limit:
                # `await future` would also cancel this caller when a thread left behind cancels the future.
                await asyncio.wait([future])
        except TimeoutError:
            future.cancel()
            if await thread.is_blocked():
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
        """Replaces the thread with a new one, unless another call has replaced it already."""
        if thread is self._thread:
            thread.leave()
            self._left_behind.append(thread)
            self._thread = self._make()
