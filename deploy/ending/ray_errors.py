"""Ray's errors as one message: which process died, and where its log is. Runs in the driver.

Ray's logs are in the cluster's directory. A cluster that the run started removes it at the end, so the log that a
message names is first copied to RUN/errors.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._private import worker

from common.errors import RoleError, UserError
from deploy.ending import exit_message, signals

_PID = re.compile(r"\bpid[=:]\s*(\d+)")
_ESSENTIAL = {"gcs_server": "Ray's control service (gcs_server)", "raylet": "Ray's node manager (raylet)"}
_SHOWN = "_ratchet_shown"  # attribute of an error that `readable` has returned
_LOG_BYTES = 64 << 10  # this much of the end of a log is copied


@contextmanager
def errors_shown_first() -> Iterator[None]:
    """Prints an error of the body, as `readable` shows it, before Ray is shut down, because the shutdown may
    hang. The rest of the command then has a time limit. Raises the error that was shown."""
    try:
        yield
    except Exception as error:
        with signals.uninterrupted():
            shown = readable(error)
            code = exit_message.print_once(shown)
        signals.limit_cleanup(code)
        if shown is error:
            raise
        raise shown from error


def readable(error: Exception) -> Exception:
    """The error to show in place of `error`: the first cause that says what to do."""
    if getattr(error, _SHOWN, False):
        return error
    shown = _readable(error)
    setattr(shown, _SHOWN, True)
    return shown


def _readable(error: Exception) -> Exception:
    if (fault := users_fault(error)) is not None:
        return fault
    if (dead := dead_cluster_process()) is not None:
        return dead
    for cause in exit_message.causes(error):
        if isinstance(cause, (ray.exceptions.OutOfMemoryError, ray.exceptions.OutOfDiskError)):
            first = str(error if isinstance(error, RoleError) else cause).strip().splitlines()[0]
            return RoleError(f"{first}; make the roles' processes smaller or fewer, or use a larger machine")
        if isinstance(cause, ray.exceptions.ObjectStoreFullError):
            return UserError("Ray's object store is full; raise ray.object_store_mib, or start the cluster with more")
        if isinstance(cause, ray.exceptions.RayActorError) and (pid := _PID.search(str(cause))):
            return _with_log(error, int(pid[1]))
    return error


def users_fault(error: BaseException | None) -> UserError | None:
    """The UserError that a role raised while its process started, if `error` follows from one. Ray passes its text."""
    while error is not None:
        if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
            _, found, message = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
            return UserError(message.strip()) if found else None
        error = error.__cause__
    return None


def essential_processes() -> list[int]:
    """Process ids of the control service and node manager of a cluster that the run started; none if it joined one."""
    node = worker._global_node
    if node is None or not node.head:
        return []
    return [started.process.pid for name in _ESSENTIAL for started in node.all_processes.get(name, [])]


def dead_cluster_process(within_s: float = 0.5) -> RoleError | None:
    """The error to show if an essential process of the run's own cluster has died. Waits up to `within_s` for it: other
    processes lose their connections at the same time, and their errors may arrive first."""
    node = worker._global_node
    deadline = time.monotonic() + within_s
    while node is not None and node.head:
        for name, title in _ESSENTIAL.items():
            for started in node.all_processes.get(name, []):
                if (code := started.process.poll()) is not None:
                    how = f"was killed by signal {-code} ({_signal(-code)})" if code < 0 else f"ended with code {code}"
                    log = _copied_logs(f"{name}.out", f"{name}.err")
                    return RoleError(f"{title}, process {started.process.pid}, {how}{log}")
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return None


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return "unknown"


def _with_log(error: Exception, pid: int) -> Exception:
    log = _copied_logs(f"worker-*-{pid}.out", f"worker-*-{pid}.err", f"python-core-worker-*_{pid}.log")
    if isinstance(error, (RoleError, UserError)):
        return type(error)(f"{error}{log}")
    return RoleError(f"{str(error).strip().splitlines()[-1]}{log}")


def _copied_logs(*patterns: str) -> str:
    """Copies the end of these logs to RUN/errors. Returns the end of the message, which names the file."""
    logs = _logs()
    found = [path for pattern in patterns for path in sorted(logs.glob(pattern))] if logs else []
    parts = [(path.name, _tail(path)) for path in found]
    text = "".join(f"==> {name}\n{content}\n" for name, content in parts if content.strip())
    if not text:
        return ""
    with suppress(OSError):
        name = f"log-{time.strftime('%Y%m%d-%H%M%S')}-{patterns[0].replace('*', '')}.txt"
        target = exit_message.errors_directory() / name
        target.write_text(text, encoding="utf-8")
        return f"; its log is {target}"
    return ""


def _tail(path: Path) -> str:
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")
    return ""


def _logs() -> Path | None:
    node = worker._global_node
    return Path(node.get_logs_dir_path()) if node is not None else None
