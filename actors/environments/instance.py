"""The user's object of one episode, and the calls of its methods, each with a time limit. Runs in each environment
replica."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Any

from actors.environments.user_threads import EpisodeThread, UserLoop
from common.daemon_threads import in_daemon_thread
from common.user_code.errors import UserCodeError
from common.user_code.methods import call_awaited, call_plain

SERVES_WITHIN_S = 1.0  # the event loop is blocked if it runs nothing new for this long


class BlocksLoopError(UserCodeError):
    """A call passed its time limit, and still blocks the event loop that all episodes share."""


class CompleteError(UserCodeError):
    """A failure that an object of Ratchet's own reports. Its reason needs no name of a method before it."""


class CallsInThreads:
    """A base of Ratchet's own environments, which run plain functions of the user in threads. Nothing can end those."""

    def __init__(self) -> None:
        self.calls_in_threads: list[Future[Any]] = []  # of the newest turn


class Deadline:
    """The time limit of one request, which may make several calls. Time in which another episode blocks the event loop
    does not count, up to `most_s` in all."""

    def __init__(self, limit_s: float, setting: str, *, most_s: float = 0.0) -> None:
        self.limit_s, self.setting = limit_s, setting
        self._end = time.monotonic() + limit_s
        self._last = max(self._end, time.monotonic() + most_s)

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return max(0.0, self._end - time.monotonic())

    def extend(self, seconds: float) -> bool:
        """Adds time. False if there is none left to add."""
        self._end = min(self._last, max(self._end, time.monotonic()) + seconds)
        return self._end > time.monotonic()


class Instance:
    """An object of the user's class. If its `step` is async, the event loop that all episodes share runs its methods.
    Otherwise a thread of its own runs them."""

    def __init__(self, make: Callable[[], Any], loop: UserLoop, name: Any) -> None:
        """`make` makes the object. `name`: of the episode."""
        self.name = name
        self.stuck = False  # a call passed its limit, and may still run
        self._make, self._loop = make, loop
        self._object: Any = None
        self._calls_in_threads: Sequence[Future[Any]] = ()  # of an object of Ratchet's own, once it is closed
        self._running: asyncio.Future[Any] | None = None  # the newest call
        self._closed = False
        self._closing = Lock()  # `close` and a constructor that ends late must not both close the object
        self._thread = None if _is_async(make) else EpisodeThread(f"environment {name}")

    async def create(self, deadline: Deadline) -> None:
        """Makes the object. Raises UserCodeError."""
        await self._run("its constructor", self._create, (), deadline)

    def _create(self) -> None:
        made = self._make()
        with self._closing:
            if not self._closed:
                self._object = made
                return
        _close_here(made)  # the constructor took too long, so nothing else has a reference to the object

    def has(self, method: str) -> bool:
        """True if the object has this method."""
        return callable(getattr(self._object, method, None))

    @property
    def needs_special_tokens(self) -> bool:
        """True if `step` must get the special tokens of the model's text."""
        return bool(getattr(self._object, "needs_special_tokens", False))

    @property
    def needs_turn(self) -> bool:
        """True if `step` must get a PolicyTurn in place of a message."""
        return bool(getattr(self._object, "needs_turn", False))

    def gave(self, method: str) -> str:
        """How messages begin that name what the method returned: "step returned", or the object's own words."""
        own = getattr(self._object, "gave", None) if self.needs_turn else None
        return own or f"{method} returned"

    async def call(self, method: str, *args: Any, deadline: Deadline) -> Any:
        """The result of the method. Raises UserCodeError, also after the deadline."""
        names = getattr(self._object, "names", {}) if self.needs_turn else {}
        return await self._run(names.get(method, method), getattr(self._object, method), args, deadline)

    async def _run(self, what: str, function: Callable[..., Any], args: tuple[Any, ...], deadline: Deadline) -> Any:
        result = await self._wait(what, self._start(function, *args), deadline)
        if inspect.isawaitable(result):  # a plain class may have async methods too
            result = await self._wait(what, self._loop.submit(call_awaited(lambda: result), self.name), deadline)
        return result

    def _start(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        if self._thread is not None:
            return self._thread.submit(function, *args)
        return self._loop.submit(call_awaited(function, *args), self.name)

    async def _wait(self, what: str, running: Future[Any], deadline: Deadline) -> Any:
        future = self._running = asyncio.wrap_future(running)
        try:
            # `await future` would also cancel this caller if the loop's thread cancels the call.
            while not (await asyncio.wait([future], timeout=deadline.left_s))[0]:
                blocked_by = await self._blocked_by()
                if blocked_by is None or blocked_by == self.name or not deadline.extend(2 * SERVES_WITHIN_S):
                    self.stuck = True
                    kind = BlocksLoopError if blocked_by == self.name else UserCodeError
                    reason = f"{what} took longer than {deadline.setting} ({deadline.limit_s:g} s)"
                    raise kind(reason, permanent=False, kind="timed_out")
        finally:
            if not future.done():
                future.cancel()
        if future.cancelled():
            raise UserCodeError(f"{what} was cancelled", kind="raised")
        try:
            return future.result()
        except CompleteError:
            raise
        except UserCodeError as error:
            raise UserCodeError(**error.after(what)) from error

    async def _blocked_by(self) -> Any:
        """The episode whose call blocks the event loop; this episode, if that is not known. None if nothing blocks the
        loop, or if this object does not use it."""
        if self._thread is not None or await self._loop.serves(SERVES_WITHIN_S):
            return None
        return self._loop.running() or self.name

    @property
    def uses_loop(self) -> bool:
        """True if the shared event loop runs its methods."""
        return self._thread is None

    @property
    def is_running(self) -> bool:
        """True if its own thread still runs, or a call of CallsInThreads. Read after `close`."""
        own = self._thread is not None and self._thread.is_alive()
        return own or not all(call.done() for call in self._calls_in_threads)

    async def close(self, limit_s: float, *, loop_blocked: bool = False) -> UserCodeError | None:
        """Closes the object, if it has not been closed. Cancels a call that still runs. If it cannot be cancelled, the
        object's `close` runs in another thread. Returns what went wrong, if anything."""
        with self._closing:
            self._closed, made, self._object = True, self._object, None
        if isinstance(made, CallsInThreads):
            self._calls_in_threads = made.calls_in_threads
        if self._running is not None and not self._running.done():
            self._running.cancel()
            self.stuck = True
        try:
            if callable(close := getattr(made, "close", None)):
                deadline = Deadline(limit_s, "its limit")
                if loop_blocked or (self.stuck and not self.uses_loop):
                    await self._wait("close", in_daemon_thread(_close_here, made), deadline)
                else:
                    await self._run("close", close, (), deadline)
        except UserCodeError as error:
            return error
        finally:
            if self._thread is not None:
                self._thread.leave()
        return None


def _close_here(made: Any) -> None:
    """Closes an object in this thread."""
    close = getattr(made, "close", None)
    if callable(close) and inspect.isawaitable(result := call_plain(close)):
        asyncio.run(call_awaited(lambda: result))


def _is_async(make: Callable[[], Any]) -> bool:
    while isinstance(make, functools.partial):
        make = make.func
    return inspect.iscoroutinefunction(getattr(make, "step", None))
