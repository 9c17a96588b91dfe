"""Which process died, and where its log is: Ray's errors as one message. Runs in the driver.

Ray's logs lie in the cluster's directory, which is removed with a cluster of our own: the log that a message names is
copied to RUN/errors first.
"""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import ray
from ray._private import worker

from common.errors import RoleError, UserError
from deploy.ending import ends

_PID = re.compile(r"\bpid[=:]\s*(\d+)")
_ESSENTIAL = {"gcs_server": "Ray's control service (gcs_server)", "raylet": "Ray's node manager (raylet)"}
_MOST = 64 << 10  # bytes of a log that are kept


def explained(error: Exception) -> Exception:
    """The error that is shown in place of `error`."""
    if (fault := users_fault(error)) is not None:
        return fault
    if (gone := lost_cluster()) is not None:
        return gone
    for cause in ends.causes(error):
        if isinstance(cause, (ray.exceptions.OutOfMemoryError, ray.exceptions.OutOfDiskError)):
            first = str(error if isinstance(error, RoleError) else cause).strip().splitlines()[0]
            return RoleError(f"{first}; make the roles' processes smaller or fewer, or use a larger machine")
        if isinstance(cause, ray.exceptions.ObjectStoreFullError):
            return UserError("Ray's object store is full; raise ray.object_store_mib, or start the cluster with more")
        if isinstance(cause, ray.exceptions.RayActorError) and (pid := _PID.search(str(cause))):
            return _with_log(error, int(pid[1]))
    return error


def users_fault(error: BaseException | None) -> UserError | None:
    """The UserError that a role raised as its process began, and that `error` follows from. Ray passes on its text."""
    while error is not None:
        if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
            _, found, message = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
            return UserError(message.strip()) if found else None
        error = error.__cause__
    return None


def essential_processes() -> list[int]:
    """The processes without which a cluster of our own does not work; none of a cluster that was joined."""
    node = worker._global_node
    if node is None or not node.head:
        return []
    return [started.process.pid for name in _ESSENTIAL for started in node.all_processes.get(name, [])]


def lost_cluster(within_s: float = 0.5) -> RoleError | None:
    """What to say if a process has died that a cluster of our own cannot do without. Its other processes lose their
    connections at the same time, and may be heard of first."""
    node = worker._global_node
    deadline = time.monotonic() + within_s
    while node is not None and node.head:
        for name, what in _ESSENTIAL.items():
            for started in node.all_processes.get(name, []):
                if (code := started.process.poll()) is not None:
                    how = f"was killed by signal {-code} ({_signal(-code)})" if code < 0 else f"ended with code {code}"
                    kept = _kept(f"{name}.out", f"{name}.err")
                    return RoleError(f"{what}, process {started.process.pid}, {how}{kept}")
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return None


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return "unknown"


def _with_log(error: Exception, pid: int) -> Exception:
    kept = _kept(f"worker-*-{pid}.out", f"worker-*-{pid}.err", f"python-core-worker-*_{pid}.log")
    if isinstance(error, (RoleError, UserError)):
        return type(error)(f"{error}{kept}")
    return RoleError(f"{str(error).strip().splitlines()[-1]}{kept}")


def _kept(*patterns: str) -> str:
    """Copies the newest part of these logs to where errors are kept; says where."""
    logs = _logs()
    found = [path for pattern in patterns for path in sorted(logs.glob(pattern))] if logs else []
    parts = [(path.name, _tail(path)) for path in found]
    text = "".join(f"==> {name}\n{content}\n" for name, content in parts if content.strip())
    if not text:
        return ""
    with suppress(OSError):
        target = ends.errors_directory() / f"log-{time.strftime('%Y%m%d-%H%M%S')}-{patterns[0].replace('*', '')}.txt"
        target.write_text(text, encoding="utf-8")
        return f"; its log is {target}"
    return ""


def _tail(path: Path) -> str:
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST))
        return file.read().decode(errors="replace")
    return ""


def _logs() -> Path | None:
    node = worker._global_node
    return Path(node.get_logs_dir_path()) if node is not None else None
