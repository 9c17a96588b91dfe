"""Stops a command on Ctrl-C, SIGTERM or SIGHUP, all in the same way. Runs in the driver.

The first signal raises Stopped in the main thread, or cancels the coroutine that `run` runs. Later signals are ignored,
so that they do not interrupt the cleanup. Only another Ctrl-C, more than a second later, ends the process at once. If
the cleanup takes longer than CLEANUP_S, a separate thread ends the process.
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
CLEANUP_S = 20.0  # a cleanup usually takes 3 s
THREADS_S = 5.0  # longest wait for threads of an event loop that ends
IMPATIENT_S = 1.0  # a Ctrl-C within this time of the first signal counts as part of it


class Stopped(KeyboardInterrupt):
    """A signal told this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _State:
    """The signals of this process."""

    installed = False  # this module handles the signals of this process
    number: int | None = None  # the first signal that came
    failure: Exception | None = None  # why the run must end, found by a watching thread
    cleanup_s = CLEANUP_S
    cleanup_limited = False  # `limit_cleanup` has been called
    uninterrupted = 0  # nesting of code that must not be interrupted
    cancel: Callable[[], Any] | None = None  # cancels the running coroutine
    before_hard_exit: Callable[[], None] | None = None


_state = _State()


def install_handlers() -> None:
    """Makes signals stop this process as this module's docstring says. Called once, in the main thread."""
    _state.installed = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Ray reads this when it is imported. Otherwise its C++ code handles SIGTERM: it prints a stack and aborts.
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    reinstall_handlers()


def reinstall_handlers() -> None:
    """Handles the signals again, after a library has installed its own handlers."""
    if not _state.installed or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: Any) -> None:
    if _state.number is not None:
        return
    _state.number = number
    if _state.uninterrupted:
        return
    if _state.cancel is not None:
        _state.cancel()
    else:
        raise Stopped(number)


def _watch(reading: int) -> None:
    """Starts the limit of the cleanup. Python runs handlers in the main thread, which may be waiting in C code; this
    thread learns of a signal at once."""
    first: float | None = None
    while True:
        for number in os.read(reading, 64):
            now = time.monotonic()
            if number not in SIGNALS:
                continue
            if first is None:
                first = now
                stopped = 128 + number, "stopped; the cleanup"
                threading.Thread(target=_limit_cleanup, args=stopped, name="cleanup limit", daemon=True).start()
            elif number == signal.SIGINT and now - first > IMPATIENT_S:
                _complain_and_exit(128 + number, "stopped at once, since Ctrl-C came again")


def limit_cleanup(code: int) -> None:
    """From now on this process has CLEANUP_S to end by itself; then it ends with this exit code."""
    if _state.installed and _state.number is None and not _state.cleanup_limited:
        _state.cleanup_s, _state.cleanup_limited = CLEANUP_S, True
        ending = code, "the cleanup"
        threading.Thread(target=_limit_cleanup, args=ending, name="cleanup limit", daemon=True).start()


def _limit_cleanup(code: int, what: str) -> None:
    began = time.monotonic()
    while time.monotonic() - began < _state.cleanup_s:  # `run` may change the limit meanwhile
        time.sleep(0.1)
    _complain_and_exit(code, f"{what} did not end within {_state.cleanup_s:g} s and was cut short")


def _complain_and_exit(code: int, why: str) -> None:
    complain(why)
    hard_exit(code)


def hard_exit(code: int) -> None:
    """Ends this process and the processes it started, from any thread, without waiting for anything."""
    with suppress(Exception):
        if _state.before_hard_exit is not None:
            _state.before_hard_exit()
    os._exit(code)


def handlers_installed() -> bool:
    """True if this module handles the signals of this process."""
    return _state.installed


def fail(error: Exception) -> None:
    """Called in a thread: cancels the coroutine that `run` runs; `run` then raises the error."""
    _state.failure = error
    if (cancel := _state.cancel) is not None:
        cancel()


def raise_if_stopped() -> None:
    """Raises Stopped if a signal came while signals could not interrupt."""
    if _state.number:
        raise Stopped(_state.number)


def call_before_hard_exit(action: Callable[[], None] | None) -> None:
    """`action` is called if the process has to end without its cleanup. It must not wait for anything."""
    _state.before_hard_exit = action


def exit_process(code: int) -> None:
    """Ends the process after its cleanup, without Python's own exit. During that, Ray would wait for seconds, and a
    signal would cause a traceback or an abort in C++."""
    if _state.installed:
        os._exit(code)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """No signal interrupts the body."""
    _state.uninterrupted += 1
    try:
        yield
    finally:
        _state.uninterrupted -= 1


class _LoopThreads(ThreadPoolExecutor):
    """The threads of an event loop. In Python 3.11 asyncio.run waits for all of them without limit. A thread that waits
    for an answer of a lost cluster would never end."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        deadline = time.monotonic() + THREADS_S
        for thread in self._threads if wait else ():
            thread.join(max(0.0, deadline - time.monotonic()))


def run(main: Coroutine[Any, Any, T], *, grace_s: float = 0.0) -> T:
    """Like asyncio.run, but a signal cancels `main`, which then has CLEANUP_S and `grace_s` to end. Works inside a
    running loop too, as in a notebook: then in a thread."""
    raise_if_stopped()
    _state.cleanup_s, _state.failure = CLEANUP_S + grace_s, None
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
        loop.set_default_executor(_LoopThreads(thread_name_prefix="asyncio"))
        _state.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if _state.number:  # the signal came before there was anything to cancel
            task.cancel()
        try:
            return await main
        finally:
            _state.cancel = None
            main.close()

    try:
        result = asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise_if_stopped()
        if _state.failure is not None:
            raise _state.failure from None
        raise
    raise_if_stopped()  # the signal may have come as `main` returned
    return result
