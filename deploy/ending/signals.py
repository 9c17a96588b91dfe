"""Ctrl-C, SIGTERM and SIGHUP: each stops a command in the same way. Runs in the driver.

The first signal raises Stopped in the main thread, or cancels the coroutine that `run` runs. Later ones are ignored, so
that none interrupts the end; but Ctrl-C more than a second after it ends the process at once. An end that takes longer
than END_S is cut short too, whatever it waits for: a thread of its own watches the clock.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from deploy.screen.console import complain

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_S = 20.0  # an end takes 3 s as a rule
IMPATIENT_S = 1.0  # Ctrl-C so long after the first signal is another wish, not a second press of the same


class Stopped(KeyboardInterrupt):
    """A signal told this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _State:
    """What this process knows of signals."""

    caught = False  # this process' signals are handled here
    number: int | None = None  # the first signal that came
    failure: Exception | None = None  # why the run must end, found by a thread that watches
    since = 0.0
    end_s = END_S
    held = 0  # code that must not be interrupted is running
    cancel: Callable[[], Any] | None = None  # of the coroutine that is running
    cut_short: Callable[[], None] | None = None  # called before the process ends at once


_state = _State()


def catch() -> None:
    """From here on signals stop this process as the module says. Called once, in the main thread."""
    _state.caught = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Read when ray is imported. Without it Ray's C++ code takes SIGTERM over as it connects, prints a stack and aborts.
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    take_back()


def take_back() -> None:
    """Handles the signals again, whoever has taken them over."""
    if not _state.caught or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _caught)


def _caught(number: int, frame: Any) -> None:
    if _state.number is not None:
        return
    _state.number, _state.since = number, time.monotonic()
    if _state.held:
        return
    if _state.cancel is not None:
        _state.cancel()
    else:
        raise Stopped(number)


def _watch(reading: int) -> None:
    """Python's handlers run in the main thread, which may be waiting in C; this thread hears of a signal at once."""
    first: float | None = None
    while True:
        for number in os.read(reading, 64):
            now = time.monotonic()
            if number not in SIGNALS:
                continue
            if first is None:
                first = now
                threading.Thread(target=_limit, args=(number,), name="end", daemon=True).start()
            elif number == signal.SIGINT and now - first > IMPATIENT_S:
                _end_now(number, "stopped at once, as asked again")


def _limit(number: int) -> None:
    began = time.monotonic()
    while time.monotonic() - began < _state.end_s:  # the limit may change meanwhile
        time.sleep(0.1)
    _end_now(number, f"stopped; something did not end within {_state.end_s:g} s and was cut short")


def _end_now(number: int, why: str) -> None:
    complain(why)
    end_now(128 + number)


def end_now(code: int) -> None:
    """Ends this process and what it started, from any thread, without waiting for anything."""
    with suppress(Exception):
        if _state.cut_short is not None:
            _state.cut_short()
    os._exit(code)


def number() -> int | None:
    """The signal that told this process to stop."""
    return _state.number


def caught() -> bool:
    """Whether this process handles signals as this module says."""
    return _state.caught


def fail(error: Exception) -> None:
    """Called in a thread: cancels the coroutine that `run` runs, which then raises the error."""
    _state.failure = error
    if (cancel := _state.cancel) is not None:
        cancel()


def check() -> None:
    """Raises Stopped if a signal came that nothing has acted on yet."""
    if _state.number:
        raise Stopped(_state.number)


def when_cut_short(action: Callable[[], None] | None) -> None:
    """`action` is called if the process has to end without its own end: it must not wait for anything."""
    _state.cut_short = action


def finished(code: int) -> None:
    """The command has ended, and everything it started too: the process ends without what Python does at its exit,
    where Ray would wait for seconds, and where a signal would end in a traceback, or in an abort from C++."""
    if _state.caught:
        os._exit(code)


@contextmanager
def held() -> Iterator[None]:
    """No signal interrupts the body."""
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1


def run(main: Coroutine[Any, Any, T], *, grace_s: float = 0.0) -> T:
    """Like asyncio.run, also where a loop is running already, as in a notebook: then in a thread. A signal cancels
    `main`, which then has END_S and `grace_s` to end."""
    check()
    _state.end_s, _state.failure = END_S + grace_s, None
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(main)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(_run, main)
        try:
            return running.result()
        except KeyboardInterrupt:
            if _state.cancel is not None:
                _state.cancel()
            raise


def _run(main: Coroutine[Any, Any, T]) -> T:
    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        _state.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if _state.number:  # it came before there was anything to cancel
            task.cancel()
        try:
            return await main
        finally:
            _state.cancel = None
            main.close()

    try:
        result = asyncio.run(cancellable())
    except asyncio.CancelledError:
        check()
        if _state.failure is not None:
            raise _state.failure from None
        raise
    check()  # it may have come as `main` returned
    return result
