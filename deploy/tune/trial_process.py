"""Starts, continues and stops the process of one run of a tuning: `ratchet train`. Runs in the driver.

It is an ordinary run in a run directory of its own. The tuning only reads its files, and stops it with SIGTERM. So it
can be continued, reported, exported and audited like any other run.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.errors import UserError
from deploy.ending.signals import CLEANUP_S
from deploy.restarts import driver_command, driver_environment
from deploy.run.lock import is_owned

POLL_S = 1.0  # time between two reads of the files of a run
RESTARTS = 1  # restarts of a run that fails, because a failure of the machine says nothing about its settings
STOP_S = CLEANUP_S + 10.0  # longest wait for a run that was told to stop; it ends itself after CLEANUP_S
OWNED_S = 90.0  # longest wait for a run that a killed start of the command has left running

# What `ratchet train --restarts` says after the reason of a failure (deploy/restarts.py).
_RESTARTS = re.compile(r"(; )?(restart \d+ of \d+|the run has used up its \d+ restarts).*")

Command = Callable[[Sequence[str]], list[str]]  # the command line that runs `ratchet` with these arguments
ShouldStop = Callable[[], bool]  # reads what is new in the run's files; True: stop the run


@dataclass(frozen=True)
class TrialProcess:
    """A run in `directory`. `arguments`: the arguments of `ratchet` that begin it, without --run. `grace_s`: additional
    time that it may take to stop, because it ends its step first."""

    directory: Path
    arguments: Sequence[str]
    grace_s: float = 0.0
    command: Command = driver_command
    poll_s: float = POLL_S

    @property
    def log(self) -> Path:
        """The file with everything that the process has printed, in all of its starts."""
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def is_complete(self) -> bool:
        """True if the run has done all of its steps: the summary is written last."""
        return (self.directory / "summary.json").exists()

    async def run(self, should_stop: ShouldStop) -> int:
        """Starts or continues the run, and calls `should_stop` every `poll_s` and once after its end. Stops the run if
        `should_stop` returns True, or if this coroutine is cancelled. Returns the exit code."""
        await self._wait_until_free()
        with open(self.log, "ab") as log:
            process = await self._started(log)
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=self.poll_s)
                if should_stop() and not ended.done():
                    break
        finally:
            await self._stop(process)
            await ended
        should_stop()  # reads what it wrote before it ended
        return process.returncode or 0

    def error_message(self) -> str:
        """The driver's last message, or the last line of the log if it has none. What its parent process adds about
        restarts is left out."""
        with suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            said = [_RESTARTS.sub("", line.removeprefix("ratchet: ")) for line in lines if line.startswith("ratchet: ")]
            return ([line for line in said if line] or lines or [""])[-1]
        return ""

    async def _wait_until_free(self) -> None:
        """Waits for the run that a killed start of the command has left: it was told to stop, which takes some
        seconds."""
        deadline = time.monotonic() + OWNED_S + self.grace_s
        while self.directory.exists() and is_owned(self.directory):
            if time.monotonic() > deadline:
                raise UserError(f"another process works in {self.directory}; stop it, then continue")
            await asyncio.sleep(self.poll_s)

    async def _started(self, log: IO[bytes]) -> asyncio.subprocess.Process:
        if (self.directory / "config.toml").exists():
            arguments = ["train", "--resume", str(self.directory)]
        else:
            arguments = [*self.arguments, "--run", str(self.directory)]
        libc, parent = ctypes.CDLL(None), os.getpid()  # loaded here: after the fork it might wait for a lock

        def stop_with_parent() -> None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a tuning that is killed leaves no run behind
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

        return await asyncio.create_subprocess_exec(
            *self.command([*arguments, "--restarts", str(RESTARTS)]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=driver_environment(),
            start_new_session=True,  # Ctrl-C is for the tuning, which then stops its runs
            preexec_fn=stop_with_parent,
        )

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        """Stops all processes of the run. The process is the parent of the driver (--restarts). A driver whose parent
        was killed continues, so both are stopped through their process group."""
        limit_s = STOP_S + self.grace_s
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), limit_s)
        if process.returncode is not None and _signal_group(process.pid, signal.SIGTERM):
            deadline = time.monotonic() + limit_s
            while _members(process.pid) and time.monotonic() < deadline:
                await asyncio.sleep(self.poll_s)
        _signal_group(process.pid, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> bool:
    """Sends the signal to all processes of the group. False if there are none."""
    if not _members(group):
        return False
    with suppress(ProcessLookupError):
        os.killpg(group, number)
    return True


def _members(group: int) -> list[int]:
    """The running processes of a process group. Zombies are left out: they stay in the group until their parent reads
    their exit code."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found
