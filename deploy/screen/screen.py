"""The base class of every screen: prints rows of numbers, and replicas that join and leave. Runs in the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape

from actors.pool.replica import PoolEvent
from common.metrics.table import Metric
from deploy.run.log import RunLog
from deploy.screen.bar import Bars
from deploy.screen.console import Output


class Column(NamedTuple):
    """One number of a row."""

    heading: str
    width: int
    key: str  # of the step record
    text: Callable[[float], str]


def columns_of(metrics: Iterable[Metric], shown: Mapping[str, tuple[int, Callable[[float], str]]]) -> list[Column]:
    """The columns `shown`: heading to width and text. The table of metrics says which metric has which heading."""
    keys = {metric.screen: metric.key for metric in metrics}
    return [Column(heading, width, keys[heading], text) for heading, (width, text) in shown.items()]


class Screen:
    """Prints to the terminal. No result of a run depends on it."""

    def __init__(
        self,
        directory: Path,
        columns: Sequence[Column] = (),
        legend: Sequence[str] = (),
        *,
        log: RunLog | None = None,
    ) -> None:
        self._console = Output()
        self._log = log or RunLog()
        self.bars = Bars(self._console)
        self._directory = directory
        self._columns, self._legend = columns, legend
        self._started = time.perf_counter()
        self._header_shown = False

    def pool(self, event: PoolEvent) -> None:
        """A replica joins or leaves."""
        calls = f"; {event.calls} call(s) are sent elsewhere" if event.calls else ""
        texts = {
            "joined": f"joined {event.seconds:.0f} s after it got room",
            "leaving": f"is leaving: {event.reason}",
            "left": f"has left{calls}",
            "died": f"died{calls}: {event.reason}",
        }
        text = f"      {event.replica} {texts[event.event]}"
        self._print(escape(text), style="yellow" if event.event == "died" else "dim")

    def say(self, text: str) -> None:
        """Prints a text, which may hold brackets and other marks of rich."""
        self._console.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Prints a line about the run, such as where a tracker shows it."""
        self._print(f"      {escape(text)}", style="dim")

    def _row(self, record: Mapping[str, float]) -> None:
        """Prints one step's numbers below the headings. A metric that this run does not have is shown as "-"."""
        if not self._header_shown:
            self._header()
        cells = (f"{c.text(record[c.key]) if c.key in record else '-':>{c.width}}" for c in self._columns)
        self._print(" ".join(cells))

    def _header(self) -> None:
        self._header_shown = True
        for line in self._legend:
            self._print(line, style="dim")
        self._print(" ".join(f"{column.heading:>{column.width}}" for column in self._columns), style="bold")

    def warn(self, message: str) -> None:
        """Writes a warning about the run to its log, because on the screen it would disturb the numbers."""
        self._log.warn(message)

    def _end(self, seconds: float, files: str) -> None:
        self.bars.close()
        where = escape(str(self._directory))
        if self._log.warnings:
            self._print(f"{self._log.warnings} warning(s) about the run: {escape(str(self._log.path))}", style="yellow")
        self._print(f"{seconds:.0f} s in all. Run directory: [bold]{where}[/] ({files})")

    def _print(self, text: str, **style: Any) -> None:
        self._console.print(text, soft_wrap=True, **style)  # a terminal may wrap; a log file should not
