"""The threads that run the user's environments: an event loop for async classes, and a thread for each episode of a
plain class. Runs in each environment replica.

The replica's own event loop runs none of the user's code, so it always answers health probes and other episodes.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any

from common.user_code.event_loops import run_until
from common.user_code.methods import call_plain
from common.user_code.ordered_calls import OrderedCalls

# The episode that a task of the user's event loop belongs to. Tasks that the user's code starts inherit it.
_owner: contextvars.ContextVar[Any] = contextvars.ContextVar("owner", default=None)


class UserLoop:
    """An event loop in a thread of its own. It survives a `sys.exit()` in a task of the user's code."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._owners: weakref.WeakKeyDictionary[asyncio.Task[Any], Any] = weakref.WeakKeyDictionary()
        self._loop.set_task_factory(self._make_task)
        self._closed = False
        Thread(target=self._run, name="environments", daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, Any], owner: Any) -> Future[Any]:
        """Starts a coroutine at once. `owner`: the episode that it belongs to."""
        context = contextvars.copy_context()
        context.run(_owner.set, owner)
        return context.run(asyncio.run_coroutine_threadsafe, work, self._loop)

    async def serves(self, within_s: float) -> bool:
        """False if the loop runs nothing new for this long, because a task blocks it."""
        served: Future[None] = Future()
        served.set_running_or_notify_cancel()  # so that a caller who stops waiting cannot cancel it
        self._loop.call_soon_threadsafe(served.set_result, None)
        done, _ = await asyncio.wait([asyncio.wrap_future(served)], timeout=within_s)
        return bool(done)

    def running(self) -> Any:
        """The owner of the task that runs now: of a blocked loop, the task that blocks it. None if it is not known."""
        task = asyncio.current_task(self._loop)
        return None if task is None else self._owners.get(task)

    def close(self) -> None:
        """Ends the thread, once no task blocks it."""
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        self._owners[task] = (options.get("context") or contextvars.copy_context()).get(_owner)
        return task

    def _run(self) -> None:
        run_until(lambda: self._closed, self._loop)
        self._loop.close()


class EpisodeThread:
    """Makes all calls of one episode in the same thread, one after another. Some objects, such as connections of
    sqlite3, can be used only in the thread that made them."""

    def __init__(self, name: str) -> None:
        self._calls = OrderedCalls(name)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Starts a call when the earlier ones have ended. The future gets its result or its UserCodeError."""
        return self._calls.submit(call_plain, function, *args)

    def leave(self) -> None:
        """Makes the thread end when its current call does."""
        self._calls.leave()

    def is_alive(self) -> bool:
        """False once the thread has ended."""
        return self._calls.is_alive()
