"""Bars for work in ranks that write their progress into a file. Runs in the driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.screen.bar import Bars
from deploy.screen.console import Output
from learner.proof.ranks import read_progress


@contextmanager
def bars_of(progress: Path, work: str) -> Iterator[None]:
    """During the block, bars on the terminal show what `learner.proof.ranks.write_progress` has written into the file.
    `work`: the name of the first bar."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.5):
            with suppress(OSError, ValueError):
                bars.show(*read_progress(progress))

    with Bars(Output()) as bars:
        thread = threading.Thread(target=follow, name="bar", daemon=True)
        if bars:
            bars.show(work, 0, None)
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.is_alive():
                thread.join()
