"""Ends a run whose cluster does not answer, even if the call that waits for it has no time limit.

Runs in the driver.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import RoleError
from deploy.ending import exit_message, signals


@contextmanager
def limited(what: str, limit_s: float) -> Iterator[None]:
    """If the body takes longer than `limit_s`, ends the run with the message that `what` did not end. A thread watches
    the clock, because the main thread may be waiting in Ray's C++ code, which nothing can interrupt."""
    ended = threading.Event()

    def watch() -> None:
        if not ended.wait(limit_s):
            end_run(RoleError(f"{what} did not end within {limit_s:g} s"))

    threading.Thread(target=watch, name="limit", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def end_run(error: RoleError) -> None:
    """Ends the run with this error, from any thread. The command line prints it and ends the process at once. Where
    Python code called the run, the coroutine of `signals.run` is cancelled and raises the error."""
    if signals.handlers_installed():
        signals.hard_exit(exit_message.print_once(error))
    signals.fail(error)
