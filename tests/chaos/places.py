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


class Place:
    """This machine. A run starts its own cluster."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: of the run."""
        self.environment = dict(environment)
        self.prefix: Sequence[str] = ()  # of every command that runs here
        self.arguments: Sequence[str] = ()  # of `ratchet train`

    def seen(self, path: Path) -> Path:
        """The path by which the harness sees a file of a process in this place."""
        return path

    def close(self) -> None:
        """Ends the processes that keep the place."""


@contextmanager
def place(kind: str, directory: Path, environment: Mapping[str, str]) -> Iterator[Place]:
    """`kind`: "", "nodes" or "disk". The disk's directory is `directory`."""
    here = {"": Place, "nodes": Nodes, "disk": partial(Disk, directory)}[kind](environment)
    try:
        yield here
    finally:
        here.close()


def _holder(prefix: Sequence[str], *namespaces: str) -> subprocess.Popen:
    """A process that does nothing but keep new namespaces."""
    command = [*prefix, "unshare", *namespaces, "sh", "-c", "echo ready; exec sleep infinity"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _, why = process.communicate()
        raise RuntimeError(f"this machine allows no namespaces of one's own: {why.strip()}")
    return process


def _inside(holder: subprocess.Popen, *namespaces: str) -> list[str]:
    return ["nsenter", "-t", str(holder.pid), "-U", *namespaces, "--preserve-credentials", "--"]


class Disk(Place):
    """A small disk for the run directory."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        super().__init__(environment)
        directory.mkdir(parents=True)
        self._holder = _holder((), "-r", "-m")
        self.prefix = _inside(self._holder, "-m")
        subprocess.run(
            [*self.prefix, "mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", directory], check=True
        )
        self._filler = self.seen(directory / "filler")

    def seen(self, path: Path) -> Path:
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def fill(self, left: int) -> None:
        """Leaves room for this many bytes."""
        free = shutil.disk_usage(self._filler.parent).free
        with suppress(OSError), open(self._filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - left))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


class Nodes(Place):
    """A Ray cluster of two nodes that `ray start` started. The run joins it from the first one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(environment)
        self.environment |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
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
        self._head = _holder((), "-r", "-n")
        self._node = _holder(_inside(self._head), "-n")
        self.prefix = _inside(self._head, "-n")
        self._in_node = _inside(self._node, "-n")
        for where, command in (
            (self.prefix, f"ip link add cable type veth peer name cable netns {self._node.pid}"),
            (self.prefix, f"ip addr add {HEAD}/24 dev cable"),
            (self._in_node, f"ip addr add {NODE}/24 dev cable"),
            *((where, f"ip link set {name} up") for where in (self.prefix, self._in_node) for name in ("lo", "cable")),
        ):
            subprocess.run([*where, *command.split()], check=True)
        self._num_nodes = 0
        self._started: list[subprocess.Popen] = []
        head = ("--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=2")
        self._start(self.prefix, HEAD, *head)
        self._join()

    def _start(self, prefix: Sequence[str], address: str, *arguments: str) -> None:
        self._num_nodes += 1
        with open(self._temporary / f"{self._num_nodes}.log", "wb") as log:
            started = subprocess.Popen(
                [
                    *(*prefix, str(RAY), "start", "--block", f"--node-ip-address={address}"),
                    *(f"--temp-dir={self._temporary}/{self._num_nodes}", f"--object-store-memory={150 << 20}"),
                    *arguments,
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
        raylets = [process for process in self._on_node(processes) if "/raylet/raylet" in process.command]
        return raylets[-1:]

    def _on_node(self, processes: list[Process]) -> list[Process]:
        namespace = os.readlink(f"/proc/{self._node.pid}/ns/net")
        found = []
        for process in processes:
            with suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/net") == namespace:
                    found.append(process)
        return found

    def repair(self, processes: list[Process]) -> None:
        for process in self._on_node(processes):
            process.send(signal.SIGKILL)
        self.plug()
        self._join()

    def close(self) -> None:
        for started in self._started:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        for holder in (self._node, self._head):
            holder.kill()
            holder.communicate()
        shutil.rmtree(self._temporary, ignore_errors=True)
