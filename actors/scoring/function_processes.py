"""Runs reward functions in worker processes, which can be killed. Runs in each reward replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.scoring.worker_process import Worker, WorkerDiedError
from common.reward_input import RewardInput
from common.user_code.errors import UserCodeError
from common.user_code.results import Outcome


class ProcessRunner:
    """A Runner in worker processes. A worker that has ended is replaced.

    A worker has one call at a time, or several if the function is async. If it ends during several calls, or one of
    them blocks its event loop past the limit, each of them is repeated alone in a new worker. A call that also fails
    there is the cause.
    """

    def __init__(self, function: str, *, takes: str, limit_s: float, workers: int) -> None:
        self._make = lambda: Worker(function, takes=takes, limit_s=limit_s)
        first = self._make()
        self.style = first.style
        self._workers: list[Worker | None] = [first, *[None] * (workers - 1)]
        self._starting = [asyncio.Lock() for _ in range(workers)]
        self._free: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for index in reversed(range(workers)):
            self._free.put_nowait(index)
        self._alone = asyncio.Lock()

    async def run(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        if self.style.is_async:
            return await self._run_async(answers)
        index = await self._free.get()
        try:
            return await (await self._worker(index)).call(answers)
        except WorkerDiedError as died:
            raise ended_its_process(died) from None
        finally:
            self._free.put_nowait(index)

    async def _run_async(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        index = min(range(len(self._workers)), key=self._load)
        try:
            return await (await self._worker(index)).call(answers)
        except WorkerDiedError as died:
            if died.calls == 1:
                raise ended_its_process(died) from None
        async with self._alone:
            worker = await asyncio.to_thread(self._make)
            try:
                return await worker.call(answers)
            except WorkerDiedError as died:
                raise ended_its_process(died) from None
            finally:
                worker.kill()

    def _load(self, index: int) -> int:
        worker = self._workers[index]
        return worker.load if worker is not None else 0

    async def _worker(self, index: int) -> Worker:
        """The worker with this index. Starts a new one if there is none, or if it has ended."""
        async with self._starting[index]:
            worker = self._workers[index]
            if worker is None or not worker.usable:
                self._workers[index] = worker = await asyncio.to_thread(self._make)
            return worker

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.kill()


def ended_its_process(died: WorkerDiedError) -> UserCodeError:
    """The error of a call that ended its worker process."""
    return UserCodeError(f"ended its process: it {died.how}", permanent=False)
