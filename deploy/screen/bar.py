"""Progress bars with the time left, on the last lines of a terminal. Piped output has none. Runs in the driver.

A bar is removed when its work is done or the command ends, so the final text on the screen is the same without bars.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from deploy.screen.console import Output, call_before_complaints, printable
from deploy.screen.text import duration

WIDTH = 12  # columns of the bar itself: 80 columns must also hold what is being done


class Bars:
    """One bar for each piece of work in progress."""

    def __init__(self, console: Output) -> None:
        self._shown: dict[str, tuple[TaskID, float, int]] = {}  # by name: task, start time, and what was done then
        one_line = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (_Cell(_name), BarColumn(WIDTH), _Cell(_count), _Cell(_left), _Cell(_doing, one_line))
        self._on = console.file.isatty()
        # Without redirection of the streams: with it, `Lenient` would write to itself.
        self._live = Progress(
            *columns,
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self._on,
        )

    def __bool__(self) -> bool:
        """True if bars can be seen."""
        return self._on

    def show(self, name: str, done: int, total: int | None, *, left_s: float | None = None) -> None:
        """Shows how much of the work called `name` is done. `total` is None while it is unknown. Without
        `left_s`, the time left is computed from the time so far."""
        if not self._on:
            return
        if name not in self._shown:
            self._live.start()
            self._live.console.show_cursor(True)  # if the process is killed, nothing else shows it again
            self._shown[name] = self._live.add_task(name, total=None, left="", doing=""), time.monotonic(), done
        task, began, done_before = self._shown[name]
        if left_s is None and total is not None and done > done_before:
            left_s = (time.monotonic() - began) / (done - done_before) * (total - done)
        self._live.update(task, completed=done, total=total, left="" if left_s is None else duration(left_s))
        call_before_complaints(self.close)

    def say(self, name: str, doing: str) -> None:
        """Shows the current activity next to the bar."""
        if name in self._shown:
            self._live.update(self._shown[name][0], doing=printable(doing))

    def hide(self, name: str) -> None:
        """Removes the bar of a piece of work, if it has one."""
        if name in self._shown:
            self._live.remove_task(self._shown.pop(name)[0])
        if not self._shown:
            self._live.stop()

    def close(self) -> None:
        """Removes all bars."""
        for name in list(self._shown):
            self.hide(name)

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Cell(ProgressColumn):
    """One text of a bar's line. rich must not read it as markup."""

    def __init__(self, text: object, column: Column | None = None) -> None:
        super().__init__(table_column=column or Column(no_wrap=True))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task))  # type: ignore[operator]


def _name(task: Task) -> str:
    return task.description


def _count(task: Task) -> str:
    return "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}"


def _left(task: Task) -> str:
    return f"{task.fields['left']} left" if task.fields["left"] else ""


def _doing(task: Task) -> str:
    return str(task.fields["doing"])
