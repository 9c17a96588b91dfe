"""Feeds the records of a run directory to its sinks, each in a thread of its own. Runs in the driver.

A sink reads what the run has written to metrics.jsonl and evaluations.jsonl. So a sink that starts late or after
--resume gets every row once, and a slow or failing sink never delays the loop.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from common.config.base import LoggingConfig, Root
from common.errors import UserError
from common.optional_packages import is_installed
from deploy.sinks.rows import NewRows, Row
from deploy.sinks.tensorboard_sink import TensorBoardSink
from deploy.sinks.wandb_sink import START_S, WandbSink

POLL_S = 5.0  # a sink looks for new records this often, and as soon as a step is done
CLOSE_S = START_S + 10.0  # longest wait for all sinks at the end of a run

Tell = Callable[[str], None]


class Sink(Protocol):
    """A tracker that gets the rows of a run, in the order of their places."""

    shown_at: str  # its address, or the command that shows it

    def write(self, row: Row) -> None:
        """Takes one row."""

    def close(self) -> None:
        """Takes no more rows, and waits until all of them have arrived."""


def check_sinks(cfg: LoggingConfig) -> None:
    """Raises UserError unless the package of every sink is installed. Sinks and packages have the same names."""
    for name in cfg.sinks:
        if not is_installed(name):
            raise UserError(
                f"logging.sinks names {name}, which is not installed; call pip install {name}, or leave it out"
            )


@contextmanager
def following(
    cfg: LoggingConfig, directory: Path, settings: Root, *, tell: Tell, report: Tell
) -> Iterator[Callable[[], None]]:
    """During the block, the sinks follow the run in this directory. Yields a function to call after each record; its
    first call opens the sinks. `tell` gets the place of each sink, `report` each failure."""
    openers: dict[str, Callable[[], Sink]] = {
        "tensorboard": partial(TensorBoardSink, directory),
        "wandb": partial(WandbSink, directory, settings),
    }
    followers = [_Follower(name, openers[name], NewRows(directory), tell, report) for name in cfg.sinks]

    def wake() -> None:
        for follower in followers:
            follower.wake()

    try:
        yield wake
    finally:
        deadline = time.monotonic() + CLOSE_S
        for follower in followers:
            follower.end()
        for follower in followers:
            follower.join(deadline)


class _Follower:
    """One sink and its thread. The thread waits for `wake` and `end`, and looks for new records every POLL_S."""

    def __init__(self, name: str, open_sink: Callable[[], Sink], rows: NewRows, tell: Tell, report: Tell) -> None:
        self._name, self._open, self._rows = name, open_sink, rows
        self._tell, self._report, self._failed = tell, report, False
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: the run ends
        # A daemon, so that a sink that hangs cannot keep the process from ending.
        self._thread = threading.Thread(target=self._follow, name=f"sink {name}", daemon=True)

    def wake(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._calls.put(False)

    def end(self) -> None:
        self._calls.put(True)

    def join(self, deadline: float) -> None:
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._fail(f"has not taken all records after {CLOSE_S:g} s; not waiting")

    def _follow(self) -> None:
        try:
            sink = self._open()
            self._tell(f"{self._name}: {sink.shown_at}")
            ended = False
            while not ended:
                ended = self._ended()
                for row in self._rows.read():
                    sink.write(row)
            sink.close()
        except Exception as error:  # any error of a tracker's library: the run continues without it
            reason = (str(error).strip().splitlines() or [""])[0]
            self._fail(
                f"failed and gets no more records ({type(error).__name__}: {reason}); the run continues without it, "
                "and --resume sends it what is missing"
            )

    def _fail(self, what: str) -> None:
        """Reports a failure, if it is the first one of this sink."""
        if not self._failed:
            self._failed = True
            self._report(f"{self._name} (logging.sinks) {what}")

    def _ended(self) -> bool:
        """Waits until there may be new records. True if the run ends."""
        try:
            ended = self._calls.get(timeout=POLL_S)
            while not self._calls.empty():
                ended |= self._calls.get()
        except queue.Empty:
            return False
        return ended
