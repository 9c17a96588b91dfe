"""A thread that makes calls one after another. Runs in the replicas that call user code."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any


class OrderedCalls:
    """A thread that makes one call after another, in the order in which they were submitted."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Starts a call when the earlier ones have ended. The future gets its result or its error."""
        future: Future[Any] = Future()
        self._calls.put((function, args, future))
        return future

    def leave(self) -> None:
        """Makes the thread end when its current call does."""
        self._calls.put(None)

    def is_alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            function, args, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args))
            except BaseException as error:  # also SystemExit of user code: the caller gets it
                future.set_exception(error)
