"""The processes of a group's ranks: they start together, are watched, and end together. Runs in the driver."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from common.config.training import TrainerConfig
from common.daemon_threads import answer, in_daemon_thread
from common.errors import RankLostError, death_reason
from common.precedence import Precedence
from learner.ranks.node_waits import tell_waits

T = TypeVar("T")

# Seconds between two probes of a rank. A rank that dies while it has nothing to do is noticed after this time.
PROBE_EVERY_S = 1.0
# Longest wait until the cluster has received the orders to kill ranks, seconds. It needs milliseconds.
KILL_S = 2.0


class Processes:
    """The ranks of one group, as Ray actors. If one is lost, the whole group is lost: ranks gather and reduce together,
    so the others cannot continue. `start` may be called again after `kill`."""

    def __init__(
        self,
        role: str,
        create: Callable[[int], Any],
        cfg: TrainerConfig,
        startup_timeout_s: float,
        report: Callable[[str], None],
        tell: Callable[[str], None],
        precedence: Precedence,
    ) -> None:
        """`create` starts the process of one rank and returns its handle. `report` gets warnings for the user, and
        `tell` which ranks wait for a node. While too few ranks have one, `precedence` lists the group as waiting."""
        self._role, self._create, self._cfg = role, create, cfg
        self._startup_timeout_s, self._report, self._tell = startup_timeout_s, report, tell
        self._precedence = precedence
        self.handles: list[Any] = []  # by rank
        self._names: list[str] = []
        self._loss: asyncio.Future[None] | None = None  # gets the RankLostError of the group's first loss
        self._watch: asyncio.Task[None] | None = None
        self._doing = "wait for a call"

    def name(self, rank: int) -> str:
        return self._names[rank]

    async def start(self) -> None:
        """Creates as many ranks as there is room for, from `min_ranks` to `ranks`. Returns when they have loaded their
        networks. Raises RankLostError."""
        self._wait_for_nodes()
        try:
            await self._start()
        finally:
            self._precedence.end_wait(self)

    def _wait_for_nodes(self) -> None:
        self._precedence.wait(self, self._role, self._cfg)

    async def _start(self) -> None:
        self._loss = asyncio.get_running_loop().create_future()
        self._names = [f"{self._role}({rank})" for rank in range(self._cfg.ranks)]
        creating = in_daemon_thread(lambda: [self._create(rank) for rank in range(self._cfg.ranks)])
        try:
            self.handles = await answer(creating, within_s=self._startup_timeout_s)
        except TimeoutError as error:
            limit = f"{self._startup_timeout_s:g} s (ray.startup_timeout_s)"
            raise self.lose(f"Ray did not create {self._role} processes within {limit}", error) from error
        except RayError as error:
            raise self.lose(f"Ray did not create {self._role} processes: {death_reason(error)}", error) from error
        telling = asyncio.create_task(
            tell_waits(
                dict(zip(self._names, self.handles, strict=True)),
                self._cfg,
                self._startup_timeout_s,
                self._tell,
                partial(self._precedence.end_wait, self),
            )
        )
        try:
            started = await self._started()
        finally:
            telling.cancel()
        waiting = [handle for rank, handle in enumerate(self.handles) if rank not in started]
        self.handles = [self.handles[rank] for rank in started]
        self._names = [self._names[rank] for rank in started]
        await _received([in_daemon_thread(ray.kill, handle) for handle in waiting])
        if waiting:
            self._report(
                f"the cluster has room for {len(self.handles)} of {self._cfg.ranks} {self._role} processes "
                "(learner.ranks); the run continues with them"
            )
        self._watch = asyncio.create_task(self._watch_all())

    async def _started(self) -> list[int]:
        """The ranks that have loaded their networks: all, or at least `min_ranks` once the others have waited for room
        long enough."""
        tasks = [awaited(handle.__ray_ready__.remote()) for handle in self.handles]
        began, enough_since = time.monotonic(), float("inf")
        while True:
            now = time.monotonic()
            for rank, task in enumerate(tasks):
                if task.done() and (error := task.exception()) is not None:
                    raise self.died(rank, "start", error)
            started = [rank for rank, task in enumerate(tasks) if task.done()]
            if len(started) >= self._cfg.fewest_ranks:
                enough_since = min(enough_since, now)
            if len(started) == len(tasks) or now - enough_since > self._cfg.room_wait_s:
                return started
            if now - began > self._startup_timeout_s and enough_since > now:
                names = ", ".join(self.name(rank) for rank in range(len(tasks)) if rank not in started)
                raise self.lose(
                    f"{names} did not start within {self._startup_timeout_s:g} s (ray.startup_timeout_s): there is no "
                    "room, or loading takes longer; give the cluster room, raise the limit, or lower learner.min_ranks"
                )
            await asyncio.sleep(0.05)

    # Losses

    @contextmanager
    def during(self, call: str) -> Iterator[None]:
        """If a rank is lost during the block, the error names this call, such as "update at step 3"."""
        self._doing, before = call, self._doing
        try:
            yield
        finally:
            self._doing = before

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises RankLostError, and cancels `work`, as soon as a rank is lost."""
        assert self._loss is not None, "the ranks were not started"
        task = awaited(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._loss}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.check()
            return await task
        finally:
            task.cancel()

    def check(self) -> None:
        """Raises the RankLostError of the group's first loss, if there was one."""
        if self._loss is not None and self._loss.done():
            self._loss.result()

    def lose(self, message: str, cause: BaseException | None = None) -> BaseException:
        """Marks the group as lost. Returns the error of its first loss, a RankLostError."""
        assert self._loss is not None, "the ranks were not started"
        if not self._loss.done():
            error = RankLostError(message)
            error.__cause__ = cause
            self._loss.set_exception(error)
        first = self._loss.exception()
        assert first is not None
        return first

    def died(self, rank: int, what: str, cause: BaseException) -> BaseException:
        """`lose` with the message that a rank died. `what`: the call, as in `during`."""
        return self.lose(f'{self.name(rank)} died during "{what}": {death_reason(cause)}', cause)

    async def _watch_all(self) -> None:
        await asyncio.gather(*map(self._probe, range(len(self.handles))))

    async def _probe(self, rank: int) -> None:
        """Asks the rank's process regularly whether it lives. Returns when it is lost. A slow call does not matter."""
        limit, handle = self._cfg.probe_timeout_s, self.handles[rank]
        while True:
            await asyncio.sleep(min(PROBE_EVERY_S, limit / 4))
            try:
                async with asyncio.timeout(limit):
                    await handle.__ray_ready__.options(concurrency_group="health").remote()
            except TimeoutError:
                silent = f"answered no health probe for {limit:g} s (learner.probe_timeout_s)"
                self.lose(f'{self.name(rank)} {silent} during "{self._doing}"')
                return
            except RayError as error:
                self.died(rank, self._doing, error)
                return

    # Ends

    async def kill(self) -> None:
        """Kills every rank. Calls that wait for one raise RankLostError."""
        if self._loss is not None:
            self.lose("the group of ranks starts again")
        self._wait_for_nodes()  # before the ranks' room is free: extra replicas may wait for it
        await _received(self._kill())

    def stop(self) -> None:
        """Kills every rank, which frees its resources. Waits until the cluster has received the orders, but at most
        KILL_S, because the cluster itself may have failed."""
        if self._loss is not None:
            self.lose("the ranks were stopped")
        self._precedence.end_wait(self)
        concurrent.futures.wait(self._kill(), KILL_S)

    def _kill(self) -> list[concurrent.futures.Future[None]]:
        if self._watch is not None:
            self._watch.cancel()
        handles, self.handles = self.handles, []
        return [in_daemon_thread(ray.kill, handle) for handle in handles]


def awaited(work: Awaitable[T]) -> asyncio.Future[T]:
    """The work as a future. If it fails when nothing waits for it any more, asyncio prints no warning."""
    future = asyncio.ensure_future(work)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


async def _received(orders: Sequence[concurrent.futures.Future[None]]) -> None:
    """Returns when the cluster has received the orders, or after KILL_S."""
    if orders:
        await asyncio.wait([asyncio.wrap_future(order) for order in orders], timeout=KILL_S)
