"""RUN/run.lock, the lock of a run directory. It works across the nodes of a shared file system.

Runs in the driver, and in commands that only ask whether a run has an owner.

The lock is an flock of a regular file that is opened for writing: NFS passes only these to its server, and a lock of
the directory would hold on one node only. A POSIX lock (lockf) would be lost as soon as this process closes any other
descriptor of the file, for example after it reads who the owner is. When a process dies, its lock ends. The file
stays, and the next owner uses it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from common.errors import UserError

LOCK = "run.lock"
_LOOK_S = 0.2  # longest wait for the lock; `is_owned` in another process holds it for less


class RunLock:
    """The lock of a directory, held until `release`. Raises UserError if another process holds it, FileNotFoundError if
    there is no such directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._descriptor = self._take()
        with suppress(OSError):  # a full disk: messages then do not name the owner
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": since}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(owner).encode() + b"\n", 0)
            os.fsync(self._descriptor)  # other nodes see it only then

    def follow(self, directory: Path) -> None:
        """Called after the directory was renamed to `directory`."""
        self._path = directory / LOCK

    def release(self) -> None:
        with suppress(OSError):  # removed while locked: the next process to get the lock checks that the file is there
            if _is_at(self._path, self._descriptor):  # not if the user has moved the directory
                self._path.unlink()
        os.close(self._descriptor)

    def _take(self) -> int:
        deadline = time.monotonic() + _LOOK_S
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise UserError(
                    f"{self._path} cannot be written ({error.strerror}); make it writable, or name another directory"
                ) from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(self._path, descriptor):
                    return descriptor
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = _owner(descriptor)
                    os.close(descriptor)
                    raise UserError(
                        f"another process works in {self._path.parent}{owner}; stop it first, or name another"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                if error.errno != errno.ESTALE:  # the file was removed on another node
                    os.close(descriptor)
                    raise UserError(
                        f"{self._path} cannot be locked ({error.strerror}); put the run directory on a file system "
                        "with flock: docs/ends.md names some"
                    ) from None
            os.close(descriptor)  # its last owner has removed the file, or the directory was renamed: try again


def is_owned(directory: Path) -> bool:
    """True if a process works in the directory. Needs no permission to write, and makes no file."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:  # another user's lock; its owner removes the file at the end
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks on this file system, so no owner either
        return False
    finally:
        os.close(descriptor)
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    """True if the descriptor is of the file at `path`. Opens that file, because NFS may answer `stat` from a cache."""
    try:
        with open(path, "rb") as named:
            return os.path.samestat(os.fstat(descriptor), os.fstat(named.fileno()))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def _owner(descriptor: int) -> str:
    """The owner that the file names, for a message; "" if it names none."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f" (process {owner['pid']} on {owner['host']}, since {owner['time']})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""
