"""The command of a run under test, as the harness watches it: its process, its output and its journal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.chaos.processes import Marked

POLL_S = 0.02


class Ended(Exception):
    """The command ended."""


class Hang(Exception):
    """No step and no message for too long."""


class Watched:
    """A run whose next step, message or end can be waited for."""

    directory: Path  # of the run, as this process sees it
    output: Path  # what the command printed
    points: Path
    process: subprocess.Popen  # the command
    marked: Marked
    hang_s: float

    def steps(self) -> int:
        """Steps on disk."""
        with suppress(FileNotFoundError):
            return sum(name.endswith(".arrow") for name in os.listdir(self.directory / "journal"))
        return 0

    def seconds_until(self, step: int, began: float) -> float | None:
        """From the time `began` until the step was on disk; None if it is not."""
        with suppress(FileNotFoundError):
            return (self.directory / f"journal/step-{step:06d}.arrow").stat().st_mtime - began
        return None

    def wait_for(
        self, condition: Callable[[], bool], *, deadline: float = float("inf"), poll_s: float = POLL_S
    ) -> None:
        """Raises Ended, Hang or TimeoutError if that comes before the condition."""
        seen, changed = None, time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                raise Ended
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError
            if (progress := (self.steps(), self.output.stat().st_size)) != seen:
                seen, changed = progress, now
            if now - changed > self.hang_s:
                raise Hang
            time.sleep(poll_s)

    def wait_for_end(self) -> None:
        """Raises Ended, or Hang."""
        self.wait_for(lambda: False)

    def last_words(self) -> str:
        """The last lines that the command printed."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-800:]

    def save_stacks(self) -> None:
        """Every Python process writes where its threads are, to a file of its own next to the run."""
        for process in self.marked.look():
            if (self.points / f"stacks-{process.pid}").exists():
                process.send(signal.SIGUSR2)
        time.sleep(1)
