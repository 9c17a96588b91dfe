"""The parent's side of one worker process (function_worker.py is the other side). Runs in each reward replica, and in
the driver for the trial of functions before a run.

A worker that passes its limit is killed, together with every process that it has started.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from actors.scoring.function_runner import too_long
from common.reward_input import RewardInput
from common.user_code.calls import CallStyle
from common.user_code.errors import UserCodeError
from common.user_code.packages import holds_ratchet, package_root
from common.user_code.results import Outcome

SCRIPT = Path(__file__).with_name("function_worker.py")
_HEADER = struct.Struct("!Q")
_GRACE_S = 5  # an async call, which the worker cancels itself, may take this much longer than its limit


class WorkerDiedError(Exception):
    """A worker ended or was killed while it had `calls` calls. `how`: the end of a sentence, such as "ended with exit
    code 1"."""

    def __init__(self, how: str, *, calls: int) -> None:
        super().__init__(how)
        self.how, self.calls = how, calls


class Worker:
    """One worker process, which has imported its function."""

    def __init__(
        self, function: str, *, takes: str, limit_s: float, ratchet_first: bool = False, output: IO[bytes] | None = None
    ) -> None:
        """Returns when the function is imported. The limit is 60 s, or limit_s if that is longer. Raises
        UserCodeError for a function that cannot be imported or called.

        `ratchet_first`: Ratchet's packages are found before the user's. `output`: file for the text that the process
        prints.
        """
        self._limit_s = limit_s
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._calls = 0
        self._writer: asyncio.StreamWriter | None = None
        self._opening = asyncio.Lock()  # several first calls may come at once
        self._killed = False
        self._suspects = 0  # unfinished calls when one of them passed its limit
        self._how_dead = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(SCRIPT), str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=_environment(),
                    start_new_session=True,  # so that the processes it starts can be killed with it
                )
            path = _search_path(ratchet_first=ratchet_first)
            self.style = self._begin({"function": function, "takes": takes, **path, "limit_s": limit_s})
        except BaseException:
            self.kill()
            raise

    def _begin(self, first: dict[str, Any]) -> CallStyle:
        limit_s = max(self._limit_s, 60)
        self._socket.settimeout(limit_s)
        try:
            self._socket.sendall(_frame(first))
            header = self._read(_HEADER.size)
            answer = pickle.loads(self._read(*_HEADER.unpack(header)))
        except TimeoutError:
            raise UserCodeError(f"took longer than {limit_s:g} s to import") from None
        except (EOFError, OSError):
            raise UserCodeError(f"its process {self._how_it_ended()} while its module was imported") from None
        if "error" in answer:
            raise UserCodeError(**answer["error"])
        self._socket.setblocking(False)
        return CallStyle(*answer["style"])

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    @property
    def load(self) -> int:
        """Number of unfinished calls."""
        return len(self._pending)

    @property
    def usable(self) -> bool:
        """False once the process has ended or was killed."""
        return not (self._killed or self._how_dead)

    async def call(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        """The outcome of each answer. Raises UserCodeError when the call fails or takes too long, WorkerDiedError when
        the process ends during the call or has ended before it, or when one of several calls blocks its event loop."""
        async with self._opening:
            if self._writer is None:
                reader, self._writer = await asyncio.open_connection(sock=self._socket)
                self._reading = asyncio.create_task(self._read_answers(reader))
        if self._how_dead:
            raise WorkerDiedError(self._how_dead, calls=2)  # 2: it ended earlier, so this call is not the only suspect
        self._calls += 1
        number, future = self._calls, asyncio.get_running_loop().create_future()
        self._pending[number] = future
        limit = asyncio.timeout(self._limit_s + (_GRACE_S if self.style.is_async else 0))
        try:
            self._writer.write(_frame({"id": number, "answers": [_plain(answer) for answer in answers]}))
            async with limit:
                answer = await future
        except TimeoutError:
            if not limit.expired():
                raise
            self._suspects = max(self._suspects, len(self._pending))
            self.kill()
            if self._suspects > 1:  # one of several async calls blocks the event loop, and it may be another one
                raise WorkerDiedError("was ended at call_timeout_s", calls=self._suspects) from None
            raise too_long(self._limit_s) from None
        except asyncio.CancelledError:
            if not self.style.is_async:
                self.kill()  # its result is not needed any more, and later calls wait for the worker
            raise
        finally:
            self._pending.pop(number, None)
        if "too_long" in answer:
            raise too_long(self._limit_s)
        if "error" in answer:
            raise UserCodeError(**answer["error"])
        return [UserCodeError(**found) if isinstance(found, dict) else found for found in answer["outcomes"]]

    async def _read_answers(self, reader: asyncio.StreamReader) -> None:
        """Passes each answer to its call, until the process ends or is killed."""
        try:
            while True:
                header = await reader.readexactly(_HEADER.size)
                answer = pickle.loads(await reader.readexactly(*_HEADER.unpack(header)))
                if (future := self._pending.get(answer["id"])) is not None and not future.done():
                    future.set_result(answer)
        except Exception:  # the stream ended, or user code wrote into it
            self.kill()
            self._how_dead = await asyncio.to_thread(self._how_it_ended)
            calls = max(self._suspects, len(self._pending))
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(WorkerDiedError(self._how_dead, calls=calls))

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code < 0:
            return f"was ended by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with exit code {code}"

    def kill(self) -> None:
        """Kills the process and all processes that it started, and closes the connection. If the process has already
        ended, the processes that it started are left running."""
        self._killed = True
        if self._process is not None and self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()
        if self._writer is None:
            self._socket.close()
        else:
            self._writer.close()


def _frame(message: dict[str, Any]) -> bytes:
    data = pickle.dumps(message)
    return _HEADER.pack(len(data)) + data


def _plain(answer: RewardInput) -> dict[str, Any]:
    """The fields in a dict, because the worker process has a different RewardInput class."""
    return {field.name: getattr(answer, field.name) for field in fields(answer)}


def _search_path(*, ratchet_first: bool) -> dict[str, list[str] | None]:
    """`path`: the worker's sys.path. `users`: directories where the user's packages may have the same names as
    Ratchet's, or None if Ratchet's packages are found first."""
    ratchet = package_root()
    others = [directory or os.getcwd() for directory in sys.path if directory != ratchet]
    if ratchet_first:
        return {"path": [ratchet, *others], "users": None}
    users = [directory for directory in others if not holds_ratchet(directory)]
    return {"path": [*users, ratchet, *(set(others) - set(users))], "users": users}


def _environment() -> dict[str, str]:
    """The worker's environment, without other copies of Ratchet on PYTHONPATH. Python processes that the worker starts
    inherit it."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in path if entry and not holds_ratchet(entry))}
