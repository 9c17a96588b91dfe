"""Reward functions in worker processes. Runs in each reward process, and in the driver, which tries functions first.

A worker that passes its limit is killed, with every process it has started, and one that dies is replaced.
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

from actors.scoring.function_threads import too_long
from common.reward_input import RewardInput
from common.user_code.calls import Form, NotFoundError, Outcome, UserCodeError
from common.user_code.functions import holds_ours, package_root

SCRIPT = Path(__file__).with_name("function_worker.py")
_HEADER = struct.Struct("!Q")
_GRACE_S = 5  # how much longer than its limit an async call, which the worker itself cancels, may take


class WorkerDiedError(Exception):
    """A worker died while it had `calls` calls."""

    def __init__(self, how: str, *, calls: int) -> None:
        super().__init__(how)
        self.how, self.calls = how, calls


class Worker:
    """One worker process, which has imported its function."""

    def __init__(
        self, function: str, *, takes: str, limit_s: float, ours_first: bool = False, output: IO[bytes] | None = None
    ) -> None:
        """Returns when the function is imported, which may take a minute, or limit_s if that is longer. Raises
        UserCodeError for a function that cannot be imported or called."""
        self._limit_s = limit_s
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._calls = 0
        self._writer: asyncio.StreamWriter | None = None
        self._killed = False
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
            first = {
                "function": function,
                "takes": takes,
                **_search_path(ours_first=ours_first),
                "limit_s": limit_s,
            }
            self.form = self._begin(first, max(limit_s, 60))
        except BaseException:
            self.kill()
            raise

    def _begin(self, first: dict[str, Any], limit_s: float) -> Form:
        self._socket.settimeout(limit_s)
        try:
            self._socket.sendall(_frame(first))
            header = self._read(_HEADER.size)
            found = pickle.loads(self._read(*_HEADER.unpack(header)))
        except TimeoutError:
            raise UserCodeError(f"took longer than {limit_s:g} s to import") from None
        except (EOFError, OSError):
            raise UserCodeError(f"its process {self._how_it_ended()} while its module was imported") from None
        if "refused" in found:
            if found["missing"] is None:
                raise _error(found["refused"])
            not_found = NotFoundError(found["refused"][0])
            not_found.missing = found["missing"]
            raise not_found
        self._socket.setblocking(False)
        return Form(*found["form"])

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
        """Calls that it has now."""
        return len(self._pending)

    @property
    def usable(self) -> bool:
        return not (self._killed or self._how_dead)

    async def call(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        """An outcome for each answer. Raises UserCodeError when the call fails or takes too long, WorkerDiedError when
        the process ends over it."""
        if self._writer is None:
            reader, self._writer = await asyncio.open_connection(sock=self._socket)
            self._reading = asyncio.create_task(self._read_answers(reader))
        if self._how_dead:
            raise WorkerDiedError(self._how_dead, calls=2)  # not of this call
        self._calls += 1
        number, future = self._calls, asyncio.get_running_loop().create_future()
        self._pending[number] = future
        limit = asyncio.timeout(self._limit_s + (_GRACE_S if self.form.is_async else 0))
        try:
            self._writer.write(_frame({"id": number, "answers": [_plain(answer) for answer in answers]}))
            async with limit:
                answer = await future
        except TimeoutError:
            if not limit.expired():
                raise
            self.kill()
            raise too_long(self._limit_s) from None
        except asyncio.CancelledError:
            if not self.form.is_async:
                self.kill()  # nobody waits for what it does, and others wait for it
            raise
        finally:
            self._pending.pop(number, None)
        if "too_long" in answer:
            raise too_long(self._limit_s)
        if "failed" in answer:
            raise _error(answer["failed"])
        return [_error(found["fault"]) if isinstance(found, dict) else found for found in answer["outcomes"]]

    async def _read_answers(self, reader: asyncio.StreamReader) -> None:
        """Until the process ends, by itself or by `kill`."""
        try:
            while True:
                header = await reader.readexactly(_HEADER.size)
                answer = pickle.loads(await reader.readexactly(*_HEADER.unpack(header)))
                if (future := self._pending.get(answer["id"])) is not None and not future.done():
                    future.set_result(answer)
        except Exception:  # end of the stream, or what user code wrote into it
            self.kill()
            self._how_dead = await asyncio.to_thread(self._how_it_ended)
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(WorkerDiedError(self._how_dead, calls=len(self._pending)))

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
        """Ends the process and all that it started; nothing happens if it has ended."""
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


class ProcessRunner:
    """A Runner (actors/scoring/function_threads.py) in worker processes. Each has one call at a
    time, of an async function
    several, which go on in another worker if one of them ends theirs."""

    def __init__(self, function: str, *, takes: str, limit_s: float, workers: int) -> None:
        self._make = lambda: Worker(function, takes=takes, limit_s=limit_s)
        first = self._make()
        self.form = first.form
        self._workers: list[Worker | None] = [first, *[None] * (workers - 1)]
        self._starting = [asyncio.Lock() for _ in range(workers)]
        self._free: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for place in reversed(range(workers)):
            self._free.put_nowait(place)
        self._alone = asyncio.Lock()

    async def run(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        if self.form.is_async:
            return await self._run_async(answers)
        place = await self._free.get()
        try:
            return await (await self._worker(place)).call(answers)
        except WorkerDiedError as died:
            raise _ended(died) from None
        finally:
            self._free.put_nowait(place)

    async def _run_async(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        place = min(range(len(self._workers)), key=self._load)
        try:
            return await (await self._worker(place)).call(answers)
        except WorkerDiedError as died:
            if died.calls == 1:
                raise _ended(died) from None
        async with self._alone:  # one of several calls ended their worker: it does so again, alone
            worker = await asyncio.to_thread(self._make)
            try:
                return await worker.call(answers)
            except WorkerDiedError as died:
                raise _ended(died) from None
            finally:
                worker.kill()

    def _load(self, place: int) -> int:
        worker = self._workers[place]
        return worker.load if worker is not None else 0

    async def _worker(self, place: int) -> Worker:
        """The worker of this place, or a new one in it."""
        async with self._starting[place]:
            worker = self._workers[place]
            if worker is None or not worker.usable:
                self._workers[place] = worker = await asyncio.to_thread(self._make)
            return worker

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.kill()


def _ended(died: WorkerDiedError) -> UserCodeError:
    return UserCodeError(f"ended its process: it {died.how}")


def _error(found: tuple[str, str, str]) -> UserCodeError:
    reason, details, fault = found
    return UserCodeError(reason, details=details, fault=fault)


def _frame(message: dict[str, Any]) -> bytes:
    data = pickle.dumps(message)
    return _HEADER.pack(len(data)) + data


def _plain(answer: RewardInput) -> dict[str, Any]:
    """The fields alone: the worker process has its own class for them."""
    return {field.name: getattr(answer, field.name) for field in fields(answer)}


def _search_path(*, ours_first: bool) -> dict[str, list[str] | None]:
    """Where the worker looks for modules, and where for packages of the user's that have names of Ratchet's."""
    ours = package_root()
    others = [directory or os.getcwd() for directory in sys.path if directory != ours]
    if ours_first:
        return {"path": [ours, *others], "users": None}
    users = [directory for directory in others if not holds_ours(directory)]
    return {"path": [*users, ours, *(set(others) - set(users))], "users": users}


def _environment() -> dict[str, str]:
    """Of the worker, and of Python processes that it starts."""
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and not holds_ours(entry)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
