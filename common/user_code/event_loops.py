"""Runs the event loop of a thread that has tasks of user code. Runs anywhere. Imports only the standard library."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def run_until(is_closed: Callable[[], bool], loop: asyncio.AbstractEventLoop) -> None:
    """Runs the loop in this thread until it is stopped and `is_closed`. A `sys.exit()` in a task ends `run_forever`, so
    without this one task would stop all others."""
    while not is_closed():
        try:
            loop.run_forever()
        except BaseException:  # of a task's code; the caller of the task gets it too
            continue
