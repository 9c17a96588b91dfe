"""Work that fails in one of two ranks. Runs in the processes that learner/proof/ranks.py starts. They import only this
file, and not torch, which would take most of the test's time."""

from __future__ import annotations

import os
import time


class Fails:
    """Work that fails in one rank while the other waits for it."""

    def __init__(self, error: Exception | None) -> None:
        """`error`: which the rank raises; None: its process ends."""
        self._error = error

    def __call__(self, rank: int, world: int, rendezvous: str) -> None:
        if rank == 0:
            time.sleep(3600)
        if self._error is None:
            os._exit(3)
        raise self._error
