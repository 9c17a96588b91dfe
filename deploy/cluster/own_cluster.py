"""The Ray cluster that a command starts for itself on this machine, in a private directory that it removes at the end.

Runs in the driver. Ray's logs, sockets and spilled objects, and the temporary files of all its processes, are in one
directory that only its owner can enter.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._private.utils import estimate_available_memory, get_shared_memory_bytes
from ray.job_config import JobConfig

from common.config.base import RayConfig
from common.errors import RoleError, UserError
from common.memory import MIB
from deploy.plan.object_store import LEAST_MIB
from deploy.screen.console import complain

_PREFIX = "ratchet-ray-"
_LOCK = "in-use"
_RAY = "r"  # Ray's part of the directory; short, for the paths of its sockets
GONE_S = 10.0  # longest wait for processes that were killed: their memory is freed by then
# A socket's path may have 107 characters, and Ray adds /session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store
# and a number to the directory's.
_LONGEST = 107 - 70


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory that only its owner can enter. It is removed at the end with everything in it. Raises UserError if
    there is no place for one."""
    base = _temporary_directory()
    _sweep(base)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    lock = os.open(directory / "new", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(directory / "new", directory / _LOCK)  # `_sweep` of another process never sees it without its lock
        yield directory
    finally:
        remove(directory)
        os.close(lock)


def remove(directory: Path, wait_s: float = 1.5) -> None:
    """Removes the directory. First it kills the processes of its cluster that are still alive after `wait_s`: some
    processes of Ray need minutes to end, and suspended ones never end."""
    deadline = time.monotonic() + wait_s
    while (left := _processes_of(directory)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _kill(left)
    for _ in range(10):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)  # something was written meanwhile


def _kill(processes: Iterable[int]) -> None:
    for pid in processes:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _processes_of(directory: Path) -> set[int]:
    """The processes that were started with the directory as TMPDIR, Ray's agents that write into its part, and their
    descendants."""
    mark, rays = f"TMPDIR={directory}".encode(), (directory / _RAY).resolve()
    found, parents = set(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError, IndexError, ValueError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                is_agent = (entry / "cmdline").read_bytes().startswith(b"ray::") and _writes_into(rays, entry)
                if is_agent or mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _writes_into(directory: Path, process: Path) -> bool:
    """True if the process has a file below the directory open for writing. This finds Ray's agents: their
    title overwrites their environment, and after the raylet's death they have another parent. A program that only
    reads there, such as `tail -f`, belongs to the user."""
    for link in (process / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if Path(os.readlink(link)).is_relative_to(directory):
                flags = (process / "fdinfo" / link.name).read_text().partition("flags:")[2].split()[0]
                if int(flags, 8) & (os.O_WRONLY | os.O_RDWR):
                    return True
    return False


def _temporary_directory() -> str:
    """The parent of the private directory: RAY_TMPDIR or TMPDIR if the path is short enough for Ray's sockets, else
    /tmp."""
    given = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    why: dict[str, str] = {}
    for base in dict.fromkeys((os.path.abspath(given), "/tmp")):
        if len(f"{base}/{_PREFIX}12345678") > _LONGEST:
            why[base] = f"its path has {len(base)} characters, more than {_LONGEST - len(_PREFIX) - 9}"
        elif not os.access(base, os.W_OK | os.X_OK) or not os.path.isdir(base):
            why[base] = "it cannot be written"
        else:
            return base
    reasons = "; ".join(f"{base}: {reason}" for base, reason in why.items())
    raise UserError(f"Ray needs a temporary directory ({reasons}); set TMPDIR to a short path that can be written")


def _sweep(base: str) -> None:
    """Removes the directories of commands that were killed before they could remove them. First it ends the processes
    of their clusters, and waits until their memory is free: this run counts on it. Ray itself would end them later, or
    never if another process than init adopts orphans."""
    for left in Path(base).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(left / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the process of its owner lives
                _end_processes_of(left)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _end_processes_of(directory: Path) -> None:
    """Returns when they are gone, after GONE_S at most. It searches again and again, because they may start other
    processes."""
    deadline = time.monotonic() + GONE_S
    while (left := _processes_of(directory)) and time.monotonic() < deadline:
        _kill(left)
        time.sleep(0.05)


def start(cfg: RayConfig, directory: Path, job: JobConfig) -> None:
    """Starts Ray in the directory, with this driver as its job. Raises UserError or RoleError if it cannot."""
    store_mib = cfg.object_store_mib or LEAST_MIB
    _check_store_below(directory, store_mib)
    _make_token_private()
    os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 starves roles when other programs run
    # By default, ray.init replaces a loopback address by the machine's own, and its servers listen on every interface.
    # With this switch they stay on loopback. Ray reads it at import, and in every process that it starts.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    variables = {"TMPDIR": str(directory), **_dashboard_variables(cfg)}  # TMPDIR: vLLM leaves files there
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables  # for every process that Ray starts
    try:
        ray.init(
            address="local",
            job_config=job,
            include_dashboard=cfg.dashboard,
            object_store_memory=store_mib * MIB,
            logging_level="ERROR",
            log_to_driver=True,
            _temp_dir=str(directory / _RAY),  # Ray makes it readable to all; its parent stays closed
        )
    except Exception as error:  # Ray raises plain ones too, such as when its node does not start within 30 seconds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RoleError(f"Ray cannot start on this machine: {reason}") from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _dashboard_variables(cfg: RayConfig) -> dict[str, str]:
    """Ray's own variables of the settings that are given. Ray's dashboard inherits them from this process."""
    dashboards = cfg.grafana_dashboards and os.path.abspath(os.path.expanduser(cfg.grafana_dashboards))
    given = {
        "RAY_PROMETHEUS_HOST": cfg.prometheus,
        "RAY_GRAFANA_HOST": cfg.grafana,
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": dashboards,
    }
    return {name: value.rstrip("/") for name, value in given.items() if value is not None}


def check_store_here(mib: int) -> None:
    """`check_store` for a cluster that would start on this machine now. Also raises UserError if there is no place for
    the cluster's directory."""
    _check_store_below(Path(_temporary_directory()), mib)


def _check_store_below(directory: Path, mib: int) -> None:
    """`check_store` with the free bytes of this machine, and of the disk of the directory."""
    check_store(mib, estimate_available_memory(), get_shared_memory_bytes(), shutil.disk_usage(directory).free)


def check_store(mib: int, memory: int, shared: int, disk: int) -> None:
    """Raises UserError unless an object store of this size fits into the free memory and into /dev/shm or the temporary
    directory's disk, whose free bytes are given. Prints a warning if it will be on the disk."""
    size, setting = mib * MIB, f"ray.object_store_mib ({mib})"
    if size < (least := ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES):
        raise UserError(f"{setting} must be at least {-(-least // MIB)}; raise it")
    if size > memory - 256 * MIB:
        raise UserError(
            f"{setting} must fit into the machine's free memory, {memory // MIB} MiB, and leave 256 MiB; lower it, or "
            "free memory"
        )
    # A store that is too large for /dev/shm may be a file on this disk, up to Ray's threshold.
    slow = min(disk, ray_constants.REQUIRE_SHM_SIZE_THRESHOLD)
    if size > max(shared, slow):
        raise UserError(
            f"{setting} must fit into /dev/shm, which has {shared // MIB} MiB free, or into the temporary directory, "
            f"{slow // MIB} MiB; lower it, or enlarge /dev/shm (a container's with --shm-size)"
        )
    if size > shared:
        complain(
            f"warning: {setting} does not fit into /dev/shm, which has {shared // MIB} MiB free, so Ray keeps weights "
            "and rollouts in a file on a disk, which is slow; enlarge /dev/shm (a container's with --shm-size)"
        )


def _make_token_private() -> None:
    """Writes the token of Ray's clusters so that only its owner can read it. Ray itself would make it readable to every
    user of the machine."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray/auth_token"
    token = secrets.token_hex(32)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # Written under another name first: a second start must not read a token that is not there yet.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".auth_token-") as file:
            file.write(token)
            file.flush()
            with suppress(FileExistsError):
                os.link(file.name, path)
        path.chmod(0o600)
    except OSError:  # if the home cannot be written, pass the token through the environment
        if not os.access(path, os.R_OK):
            os.environ["RAY_AUTH_TOKEN"] = token
