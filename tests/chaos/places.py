"""Where a run takes place: on this machine, on a cluster of two nodes, or on a small disk. Runs in the harness.

The nodes of the cluster are network namespaces with a cable (a veth pair) between them, and the small disk is a tmpfs
in a mount namespace. All of it belongs to a user namespace, so it needs no privileges where the machine allows user
namespaces, and nothing of it is left when its processes have ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tests.chaos.processes import Process

HEAD, NODE, PORT = "10.99.0.1", "10.99.0.2", 6379
RAY = Path(sys.executable).with_name("ray")
DISK_MIB = 24


class NoNamespaces(Exception):
    """This machine does not let the user make namespaces."""


class Place:
    """This machine. A run starts its own cluster."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: of the run."""
        self.environment = dict(environment)
        self.prefix: Sequence[str] = ()  # of every command that runs here
        self.arguments: Sequence[str] = ()  # of `ratchet train`

        self._holders: list[subprocess.Popen] = []  # processes that do nothing but keep namespaces

    def open(self) -> None:
        """Makes the place."""

    @property
    def holders(self) -> set[int]:
        """Process ids."""
        return {holder.pid for holder in self._holders}

    def seen(self, path: Path) -> Path:
        """The path by which the harness sees a file of a process in this place."""
        return path

    def close(self) -> None:
        """Ends the processes that keep the place, with which it vanishes."""
        for holder in self._holders:
            holder.kill()
            holder.communicate()

    def hold(self, prefix: Sequence[str], *namespaces: str) -> subprocess.Popen:
        """Makes namespaces, inside those of `prefix`."""
        command = [*prefix, "unshare", *namespaces, "sh", "-c", "echo ready; exec sleep infinity"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        holder = subprocess.Popen(command, env=self.environment, text=True, **pipes)
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            _, why = holder.communicate()
            raise NoNamespaces(f"this machine allows no namespaces of one's own: {why.strip()}")
        return holder


@contextmanager
def place(kind: str, directory: Path, environment: Mapping[str, str]) -> Iterator[Place]:
    """`kind`: "", "nodes" or "disk". The disk's directory is `directory`."""
    here = {"": Place, "nodes": Nodes, "disk": partial(Disk, directory)}[kind](environment)
    try:
        here.open()
        yield here
    finally:
        here.close()


def _inside(holder: subprocess.Popen, *namespaces: str) -> list[str]:
    return ["nsenter", "-t", str(holder.pid), "-U", *namespaces, "--preserve-credentials", "--"]


class Disk(Place):
    """A small disk for the run directory."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        super().__init__(environment)
        self._directory = directory

    def open(self) -> None:
        self._directory.mkdir(parents=True)
        self._holder = self.hold((), "-r", "-m")
        self.prefix = _inside(self._holder, "-m")
        mount = ("mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(self._directory))
        subprocess.run([*self.prefix, *mount], check=True)
        self._filler = self.seen(self._directory / "filler")

    def seen(self, path: Path) -> Path:
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def fill(self, left: int) -> None:
        """Leaves room for this many bytes."""
        with open(self._filler, "wb", buffering=0) as file:
            with suppress(OSError):  # full
                while file.write(bytes(64 << 10)):
                    pass
            file.truncate(max(0, file.tell() - left))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


class Nodes(Place):
    """A Ray cluster of two nodes that `ray start` started. The run joins it from the first one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(environment)
        self.environment |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            # The shortest times that Ray accepts for noticing a dead node.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.arguments = ("--address", f"{HEAD}:{PORT}")
        self._temporary = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # the paths of Ray's sockets begin with it
        self._started: list[subprocess.Popen] = []

    def open(self) -> None:
        head = self.hold((), "-r", "-n")
        self._node = self.hold(_inside(head), "-n")
        self.prefix, self._in_node = _inside(head, "-n"), _inside(self._node, "-n")
        for where, command in (
            (self.prefix, f"ip link add cable type veth peer name cable netns {self._node.pid}"),
            (self.prefix, f"ip addr add {HEAD}/24 dev cable"),
            (self._in_node, f"ip addr add {NODE}/24 dev cable"),
            *((where, f"ip link set {name} up") for where in (self.prefix, self._in_node) for name in ("lo", "cable")),
        ):
            subprocess.run([*where, *command.split()], check=True)
        self._start(self.prefix, HEAD, "--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=2")
        self._join()

    def _start(self, prefix: Sequence[str], address: str, *arguments: str) -> None:
        temporary = self._temporary / str(len(self._started))
        with open(f"{temporary}.log", "wb") as log:
            started = subprocess.Popen(
                [
                    *(*prefix, str(RAY), "start", "--block", f"--node-ip-address={address}", *arguments),
                    *(f"--temp-dir={temporary}", f"--object-store-memory={150 << 20}"),
                ],
                env={**self.environment, "TMPDIR": str(self._temporary)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(started)
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in (text := Path(log.name).read_bytes()):
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a node did not start: {text.decode(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def _join(self) -> None:
        self._start(self._in_node, NODE, f"--address={HEAD}:{PORT}", "--num-cpus=1")

    def cut(self) -> None:
        """Takes the cable out."""
        subprocess.run([*self.prefix, "ip", "link", "set", "cable", "down"], check=True)

    def plug(self) -> None:
        subprocess.run([*self.prefix, "ip", "link", "set", "cable", "up"], check=True)

    def of_node(self, processes: list[Process]) -> list[Process]:
        """The node manager of the second node."""
        return [process for process in self._on_node(processes) if "/raylet/raylet" in process.command.split(" ")[0]]

    def _on_node(self, processes: list[Process]) -> list[Process]:
        namespace = os.readlink(f"/proc/{self._node.pid}/ns/net")
        found = []
        for process in processes:
            with suppress(OSError):
                if process.pid != self._node.pid and os.readlink(f"/proc/{process.pid}/ns/net") == namespace:
                    found.append(process)
        return found

    def repair(self, processes: list[Process]) -> None:
        """Replaces a lost node, as a cloud does: switches it off, and starts another one."""
        for process in self._on_node(processes):
            process.send(signal.SIGKILL)
        self.plug()
        self._join()

    def close(self) -> None:
        for started in self._started:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        super().close()
        shutil.rmtree(self._temporary, ignore_errors=True)
