"""RUN/log.txt: what the roles of a run printed, and warnings about the run. Runs in the driver."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from deploy.screen.console import complain, printable

NAME = "log.txt"
# At this size the file becomes log.txt.1, and the old log.txt.1 is removed: engines never stop printing.
MOST_BYTES = 32 << 20


class RunLog:
    """The log of a run directory. Until `open`, warnings go to standard error, and everything else is dropped. A full
    disk does not end the run here. Any thread may write."""

    def __init__(self) -> None:
        self._file: _Quiet | None = None
        self.path: Path | None = None
        self.warnings = 0

    def open(self, directory: Path) -> None:
        """Appends to the log of this run from now on. The file is made with its first line."""
        self.path = directory / NAME
        self._file = _Quiet(self.path, maxBytes=MOST_BYTES, backupCount=1, encoding="utf-8", delay=True)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))

    def write(self, source: str, line: str) -> None:
        """Writes one line that a source, such as Generator(0), has printed."""
        if self._file is not None:
            self._file.handle(logging.LogRecord(source, logging.INFO, "", 0, printable(line), None, None))

    def warn(self, message: str) -> None:
        """Writes a warning about the run to the log, because on the screen it would disturb the numbers."""
        if self._file is None:
            complain(message)
            return
        self.warnings += 1
        self.write("ratchet", f"warning: {message}")

    @contextmanager
    def python_warnings(self) -> Iterator[None]:
        """During the block, warnings of Python code in this process are warnings about the run."""
        before = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
        ) -> None:
            self.warn(f"{category.__name__}: {message} ({filename}, line {lineno})")

        warnings.showwarning = show
        try:
            yield
        finally:
            warnings.showwarning = before

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Quiet(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        pass  # by default it prints a traceback
