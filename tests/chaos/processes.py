"""The processes of a run under test: found in /proc, by a mark in their environment and by descent. Runs in the
harness."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROLES = {
    "generator": "ray::Generator",
    "reward": "ray::Reward",
    "reference": "ray::Reference",
    "learner": "ray::Learner",
}


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    began: int  # in ticks since the machine's start: a pid alone may be used again
    command: str
    state: str

    def send(self, number: int) -> bool:
        """Sends a signal, unless the process has ended. Returns whether it was sent."""
        if (now := read(self.pid)) is None or now.began != self.began:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False

    @property
    def alive(self) -> bool:
        now = read(self.pid)
        return now is not None and now.began == self.began and now.state != "Z"


def read(pid: int) -> Process | None:
    """The process with this id, if there is one."""
    with suppress(OSError, ValueError, IndexError):
        state, parent, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return Process(pid, int(parent), int(rest[17]), command, state)
    return None


class Marked:
    """All processes that have CHAOS_MARK=mark in their environment, and their descendants.

    Some processes overwrite their environment when they set their title. So every process that was seen once is
    remembered, to find it after its parent has ended.
    """

    def __init__(self, mark: str) -> None:
        self._mark = f"CHAOS_MARK={mark}".encode()
        self._seen: dict[int, Process] = {}

    def look(self) -> list[Process]:
        """The processes that live now."""
        everything = {pid: process for pid in _pids() if (process := read(pid)) is not None}
        found = {pid for pid, old in self._seen.items() if pid in everything and everything[pid].began == old.began}
        found |= {pid for pid in everything if self._has_mark(pid)}
        while more := {pid for pid, process in everything.items() if process.parent in found} - found:
            found |= more
        self._seen = {pid: everything[pid] for pid in found}
        return [process for process in self._seen.values() if process.state != "Z"]

    def _has_mark(self, pid: int) -> bool:
        with suppress(OSError):
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def kill(self, limit_s: float = 20.0) -> list[Process]:
        """Kills all of them. Returns those that lived."""
        killed: dict[int, Process] = {}
        deadline = time.monotonic() + limit_s
        while (alive := self.look()) and time.monotonic() < deadline:
            for process in alive:
                killed[process.pid] = process
                process.send(signal.SIGKILL)
            time.sleep(0.05)
        return list(killed.values())


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def of_role(processes: list[Process], target: str, supervisor: int) -> list[Process]:
    """The processes that a target's name stands for. `supervisor`: the process that the harness started, which
    restarts the driver; no target includes it."""
    if target == "everything":
        return [process for process in processes if process.pid != supervisor]
    if target == "driver":
        trains = [process for process in processes if "deploy.cli" in process.command and " train " in process.command]
        return [process for process in trains if process.pid != supervisor]
    if target == "gcs":
        return [process for process in processes if "/gcs_server" in process.command.split(" ")[0]]
    if target == "raylet":
        return [process for process in processes if "/raylet/raylet" in process.command.split(" ")[0]]
    if target == "engine":  # worker processes of an engine whose model is split
        generators = {process.pid for process in processes if process.command.startswith(ROLES["generator"])}
        return [process for process in processes if process.parent in generators and "tracker" not in process.command]
    return [process for process in processes if process.command.startswith(ROLES[target])]


def of_run(processes: list[Process]) -> list[Process]:
    """The processes of a run on a cluster that runs on without it: roles, their engines' workers, and drivers."""
    roles = [process for process in processes if process.command.startswith(tuple(ROLES.values()))]
    return [*roles, *of_role(processes, "engine", 0), *of_role(processes, "driver", 0)]
