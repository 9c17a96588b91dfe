"""The largest memory of each process of a command: `python -m tests.process_memory ARGUMENTS OF RATCHET`.

It looks five times a second into /proc/PID/status. Private and file memory (RssAnon + RssFile) are counted; pages of
the object store (RssShmem) apart. A peak between two looks is missed. The kernel's own VmHWM bounds it, and counts all.
docs/plan.md compares the peaks with the estimate of `ratchet plan`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.memory import MIB

LOOK_EVERY_S = 0.2
ROLE = re.compile(r"ray::(\w+)")


@dataclass
class Peak:
    """The largest sizes of one process so far, bytes."""

    role: str
    own: int = 0  # private and file memory at once
    anonymous: int = 0
    file: int = 0
    shared: int = 0
    all: int = 0  # VmHWM

    def see(self, sizes: dict[str, int]) -> None:
        """Takes one look at the process."""
        if (own := sizes["RssAnon"] + sizes["RssFile"]) > self.own:
            self.own, self.anonymous, self.file = own, sizes["RssAnon"], sizes["RssFile"]
        self.shared = max(self.shared, sizes["RssShmem"])
        self.all = max(self.all, sizes["VmHWM"])


class ProcessMemory:
    """Watches the role processes below a process."""

    def __init__(self, ancestor: int) -> None:
        self._ancestor = ancestor
        self._earlier = {pid for pid, _ in _parents() if pid != ancestor}
        self.peaks: dict[int, Peak] = {}  # by process id, of processes that are younger than this object

    def look(self) -> None:
        """Looks once at every process below the ancestor."""
        parents = dict(_parents())
        for pid in parents.keys() - self._earlier:
            above = pid
            while above in parents and above != self._ancestor:
                above = parents[above]
            if above == self._ancestor:
                with suppress(OSError, KeyError, IndexError):  # it has ended
                    self._see(pid)

    def _see(self, pid: int) -> None:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        role = "Driver" if pid == self._ancestor else (found[1] if (found := ROLE.match(title)) else None)
        if role is not None and role not in ("IDLE", "DashboardAgent", "RuntimeEnvAgent"):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            sizes = {key: 1024 * int(status[key].split()[0]) for key in ("RssAnon", "RssFile", "RssShmem", "VmHWM")}
            peak = self.peaks.setdefault(pid, Peak(role))
            peak.role = role
            peak.see(sizes)

    @contextmanager
    def watching(self) -> Iterator[ProcessMemory]:
        """Looks again and again during the block."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK_EVERY_S):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()

    def of(self, role: str) -> list[Peak]:
        """The processes of one role."""
        return [peak for peak in self.peaks.values() if peak.role == role]


def _parents() -> Iterator[tuple[int, int]]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError, IndexError, ValueError):
                yield int(entry), int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])


def main(arguments: list[str]) -> int:
    command = subprocess.Popen([sys.executable, "-m", "deploy.cli", *arguments])
    with ProcessMemory(command.pid).watching() as memory:
        code = command.wait()
    for peak in sorted(memory.peaks.values(), key=lambda peak: peak.role):
        sizes = (peak.own, peak.anonymous, peak.file, peak.shared, peak.all)
        print(peak.role.ljust(18), *(f"{size / MIB:8.0f}" for size in sizes), flush=True)
    return code


if __name__ == "__main__":
    print("process".ljust(18), *(name.rjust(8) for name in ("own", "private", "file", "store", "VmHWM")))
    began = time.monotonic()
    code = main(sys.argv[1:])
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(code)
