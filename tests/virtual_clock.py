"""A clock for tests of what waits. It stands still while anything runs. When everything waits, it jumps to the end of
the shortest wait. So the load of the machine changes nothing, and a wait of a minute takes no time.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Where an event loop would sleep, `now` passes instead, seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0  # not 0, which some code takes for long ago

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(timeout if timeout is None else 0)
        if timeout is not None and timeout > 0 and not found:
            self.now += timeout
        return found


def run(main: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`, with such a clock for the event loop and `time.monotonic`. For code in one thread only: the
    clock does not stand still for others."""
    selector = _Jumping()

    def new_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now  # type: ignore[method-assign]
        return loop

    with patch.object(time, "monotonic", lambda: selector.now), asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)
