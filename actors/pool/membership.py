"""Keeps a pool's replicas: they join, catch up, serve, and leave or die while calls continue.

Runs in the driver. A replica's life is one coroutine, `Membership._live`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from actors.pool.deaths import MAX_DEATHS, Deaths, drop_tracebacks
from actors.pool.host import Host
from actors.pool.replica import STATES, PoolEvent, Replica
from actors.pool.routing import Router
from actors.pool.size import Size, leave_first, num_placed
from common.config.base import Pooled
from common.errors import RoleError, UserError, death_reason
from common.metrics import meters
from common.precedence import Precedence

# Most replicas that wait for room on the cluster at once. An autoscaler adds nodes for all of them together, so with
# fewer a pool grows more slowly: a new node takes minutes. With more, more replicas load a model at the same time.
MAX_PENDING = 8
# Seconds between two looks at the cluster and the size of the pool.
TICK_S = 0.5
# Longest wait until the cluster has received the orders to kill a pool's replicas, seconds. It needs milliseconds. A
# role that has something to close gets more (`Host.close_s`).
STOP_S = 2.0

OnEvent = Callable[[PoolEvent], None]
CatchUp = Callable[[Replica], Awaitable[None]]
HandOver = Callable[[Any], Awaitable[None]]


class Membership:
    """Keeps `target` replicas of one role, as far as the cluster has room; the run needs `cfg.min` of them.

    A replica is dead when its connection breaks, or when its process answers no probe for `probe_timeout_s`; a slow
    call does not matter. Dead replicas are replaced after a growing delay.
    """

    def __init__(
        self,
        host: Host,
        cfg: Pooled,
        router: Router,
        *,
        on_event: OnEvent = lambda event: None,
        catch_up: CatchUp | None = None,
        hand_over: HandOver | None = None,
    ) -> None:
        """`catch_up` brings a new replica to the state of the others, and returns when it may be called. `hand_over`
        makes the replica of a handle end its calls with partial results, for other replicas to continue."""
        self.role = host.role
        self.target = cfg.max_replicas
        self._host, self._cfg, self._router = host, cfg, router
        self._on_event, self._catch_up, self._hand_over = on_event, catch_up, hand_over
        self._replicas: dict[int, Replica] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._last_number = 0
        self._precedence = Precedence()
        self._size = Size(cfg.min)
        self.makes_room_for: Mapping[str, float] = {}  # other roles; seconds since then
        self._deaths = Deaths()
        self._may_start = True
        self._short_since: float | None = time.monotonic()  # since then fewer than `min` are ready
        self.was_complete = False  # `min` replicas were ready at some time
        self._leaving_nodes: Mapping[str, float] = {}
        self._failure: Exception | None = None

    async def start(self, timeout_s: float, precedence: Precedence) -> None:
        """Returns when `min` replicas are ready. Replicas above `min` make room for what waits in `precedence`. Raises
        UserError if the start takes longer than `timeout_s`, RoleError if a replica dies while no other is ready."""
        self._startup_timeout_s, self._precedence = timeout_s, precedence
        precedence.wait(self, self.role, self._cfg)
        meters.count("ratchet_pool_joins_total", 0, role=self.role)
        meters.count("ratchet_pool_reissues_total", 0, role=self.role)
        meters.count("ratchet_pool_leaves_total", 0, role=self.role, reason="died")
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._on_supervisor_end)
        while len(self.ready) < self._cfg.min:
            if self._failure is not None:
                self.stop()
                raise self._failure
            await asyncio.sleep(0.05)

    @property
    def min_replicas(self) -> int:
        """Replicas that the run needs."""
        return self._cfg.min

    @property
    def replicas(self) -> list[Replica]:
        """All replicas that are alive, in every state."""
        return [replica for replica in self._replicas.values() if replica.state != "dead"]

    @property
    def ready(self) -> list[Replica]:
        """The replicas that serve calls, suspended ones included."""
        return [replica for replica in self._replicas.values() if replica.state == "ready"]

    @property
    def waiting(self) -> list[Replica]:
        """The replicas without a node, while the run needs them: fewer than `min` have one."""
        needed = num_placed(self._replicas.values()) < self._cfg.min
        return [replica for replica in self._replicas.values() if needed and replica.state == "pending"]

    @property
    def _may_create(self) -> bool:
        """False after `hold_starts`, and during the delay after a death."""
        return self._may_start and time.monotonic() >= self._deaths.wait_until

    @property
    def last_death(self) -> str:
        """Why the last dead replica died, in one line."""
        return death_reason(self._deaths.last_error)

    def find(self, number: int) -> Replica | None:
        """The replica with this number; None once it has ended."""
        return self._replicas.get(number)

    def stop(self) -> None:
        """Kills every replica, which frees its resources. Waits until the cluster has received the orders, but only for
        a limited time, because the cluster itself may have failed."""
        self._supervisor.cancel()
        self._precedence.end_wait(self)
        for life in self._lives:
            life.cancel()
        orders = [order for replica in self._replicas.values() for order in self._kill(replica)]
        concurrent.futures.wait(orders, STOP_S + self._host.close_s)
        self._replicas.clear()

    def _kill(self, replica: Replica) -> list[concurrent.futures.Future[None]]:
        """Orders the replica's process to be killed, once; nothing if it was never created."""
        if replica.handle is None or replica.killed:
            return []
        replica.killed = True
        return [self._host.kill(replica.handle, close=replica.joined and replica.state != "dead")]

    def lose(self, replica: Replica, error: BaseException) -> None:
        """Marks a replica as dead, unless it is leaving already. It gets no more calls and is replaced."""
        if not replica.ended:
            replica.error = error
            replica.calls_lost = self._router.calls(replica.number)
            self._enter(replica, "dead")

    def suspend(self, replica: Replica, why: str) -> None:
        """Sends the replica no new calls until `resume` is called for the same reason."""
        replica.suspended_for.add(why)
        self._route(replica)

    def resume(self, replica: Replica, why: str) -> None:
        """Ends a `suspend`. The replica gets calls again if no other reason holds it back."""
        replica.suspended_for.discard(why)
        self._route(replica)

    def answered(self) -> None:
        """A call was answered, so the deaths before it are not counted any more."""
        self._deaths.forget()

    def _enter(self, replica: Replica, state: str) -> None:
        replica.enter(state)
        self._route(replica)

    def _route(self, replica: Replica) -> None:
        if replica.state == "ready" and not replica.suspended_for:
            self._router.open(replica.number)
        else:
            self._router.close(replica.number)

    async def _supervise(self) -> None:
        """Keeps the pool at its target size, and fails it when too few replicas are ready for too long. Works every
        TICK_S; nothing else wakes it."""
        while True:
            # All at once: if the cluster does not answer, each of these takes seconds and would delay the checks below.
            await asyncio.gather(self._look_at_nodes(), *map(self._look_at, self.replicas))
            for replica in self.replicas:
                if (left_s := self._leaving_nodes.get(replica.node or "")) is not None:
                    # Half of the node's remaining time, because handing over takes time, too.
                    replica.leave_by = min(replica.leave_by, time.monotonic() + left_s / 2)
                    self._dismiss(replica, "its node is leaving")
            self._adjust_size()
            for state in STATES:
                number = sum(replica.state == state for replica in self._replicas.values())
                meters.gauge("ratchet_pool_replicas", number, role=self.role, state=state)
            meters.gauge("ratchet_pool_waiting_calls", self._router.num_waiting, role=self.role)
            if self._check_shortage(self._cfg.max_shortage_s if self.was_complete else self._startup_timeout_s):
                return
            await asyncio.sleep(TICK_S)

    def _on_supervisor_end(self, supervisor: asyncio.Task[None]) -> None:
        if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
            self._fail(RoleError(f"the pool of {self.role} replicas failed: {error}"), error)

    async def _look_at_nodes(self) -> None:
        with suppress(*self._host.outages):  # the cluster cannot answer now: keep its last answer
            self._leaving_nodes = await self._host.leaving_nodes()

    async def _look_at(self, replica: Replica) -> None:
        """Follows a replica through its start. If the cluster did not answer until it was ready, asks for its node
        later."""
        if replica.node is None and replica.handle is not None:
            with suppress(*self._host.outages):
                replica.node = await self._host.node(replica.handle)
            if replica.node is not None and replica.state == "pending":  # its state may have changed during the await
                self._enter(replica, "starting")
        elif replica.state == "starting" and time.monotonic() - replica.since > self._startup_timeout_s:
            limit = f"{self._startup_timeout_s:g} s (ray.startup_timeout_s)"
            self.lose(replica, RoleError(f"{replica.name} did not start within {limit}"))

    async def hold_starts(self) -> None:
        """No replica is created until `allow_starts`. Returns when none is starting any more."""
        self._may_start = False
        while any(replica.state == "starting" for replica in self._replicas.values()):
            await asyncio.sleep(TICK_S)

    def allow_starts(self) -> None:
        self._may_start = True

    def _adjust_size(self) -> None:
        """Tells replicas to leave if there are too many, and creates some if there are too few."""
        replicas = list(self._replicas.values())
        staying = [replica for replica in replicas if not replica.ended]
        pending = sum(replica.state == "pending" for replica in staying)
        if num_placed(replicas) < self._cfg.min and (pending or self._may_create):
            self._precedence.wait(self, self.role, self._cfg)
        else:
            self._precedence.end_wait(self)
        waits_s = self._precedence.waits_s(self._cfg)
        size = self._size.allowed(self.target, replicas, max(waits_s.values(), default=None))
        others = {role: waited_s for role, waited_s in waits_s.items() if role != self.role}
        self.makes_room_for = others if size < self.target else {}
        if (surplus := len(staying) - size) > 0:
            makes_room = "it makes room for a process that the run needs"
            reason = makes_room if size < self.target else "the target was lowered"
            for replica in leave_first(staying, self._router)[:surplus]:
                self._dismiss(replica, reason)
        # A dead replica is here until its life has recorded its death, which sets the delay before a replacement.
        recorded = all(replica.state != "dead" for replica in replicas)
        if recorded and self._may_create:
            for _ in range(min(size - len(staying), MAX_PENDING - pending)):
                self._create()

    def _create(self) -> None:
        taken = {replica.name for replica in self._replicas.values()}
        name = next(name for i in range(len(taken) + 1) if (name := f"{self.role}({i})") not in taken)
        self._last_number += 1
        replica = Replica(self._last_number, name)
        self._replicas[replica.number] = replica
        life = asyncio.create_task(self._live(replica))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)

    async def _live(self, replica: Replica) -> None:
        """The life of a replica, from its creation to its end."""
        try:
            await replica.unless_ended(self._join(replica))
            if replica.joined:
                await replica.unless_ended(self._probe(replica))
                await self._leave(replica)
        except Exception as error:  # it died, or failed to start
            self.lose(replica, error)
            self._on_death(replica, error)
        finally:
            self._router.forget(replica.number)
            self._replicas.pop(replica.number, None)
            self._kill(replica)  # its process may still be alive although its engine is dead

    async def _join(self, replica: Replica) -> None:
        replica.handle = await self._host.create(replica.name)
        await replica.handle.ready.remote()
        await self._look_at(replica)
        if self._catch_up is not None:
            await self._catch_up(replica)
        if replica.ended:
            return
        replica.joined = True
        self._enter(replica, "ready")  # no await since catch_up: newer weights could come in between
        self.was_complete |= len(self.ready) >= self._cfg.min
        self._emit(replica, "joined", seconds=replica.lasted_s)
        meters.count("ratchet_pool_joins_total", role=self.role)
        meters.observe("ratchet_pool_startup_seconds", replica.lasted_s, role=self.role)

    async def _probe(self, replica: Replica) -> None:
        """Raises an error when the replica's process stops answering. A slow answer to a call does not matter."""
        limit = self._cfg.probe_timeout_s
        while True:
            await asyncio.sleep(limit / 4)
            try:
                await asyncio.wait_for(self._host.probe(replica.handle), limit)
            except TimeoutError as error:
                message = f"{replica.name} answered no health probe for {limit:g} s (probe_timeout_s)"
                raise RoleError(message) from error

    async def _leave(self, replica: Replica) -> None:
        """Lets a leaving replica finish its calls. When its time is up, the replica hands them over."""
        served_s, calls = replica.lasted_s, self._router.calls(replica.number)
        self._emit(replica, "leaving", reason=replica.reason, calls=calls)
        replica.leave_by = min(replica.leave_by, time.monotonic() + self._cfg.drain_s)
        if calls and (calls := await self._finish(replica)) and self._hand_over is not None:
            with suppress(TimeoutError, *self._host.losses):
                async with asyncio.timeout(self._cfg.drain_s):
                    await self._hand_over(replica.handle)
                    await replica.idle.wait()
        self._emit(replica, "left", reason=replica.reason, seconds=served_s, calls=calls)
        meters.count("ratchet_pool_leaves_total", role=self.role, reason=replica.reason)

    async def _finish(self, replica: Replica) -> int:
        """Waits until the replica has no calls, or until `leave_by`, which a drain notice may move forward meanwhile.
        Returns how many calls it still has."""
        while (calls := self._router.calls(replica.number)) and (left_s := replica.leave_by - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 0.05))
        return calls

    def _dismiss(self, replica: Replica, reason: str) -> None:
        if not replica.ended:
            replica.reason = reason
            self._enter(replica, "leaving")

    def _on_death(self, replica: Replica, error: BaseException) -> None:
        reason, served_s = death_reason(error), replica.lasted_s if replica.joined else 0.0
        too_many = self._deaths.record(error, began=replica.began, served_s=served_s, tried_alone=replica.tried_alone)
        meters.count("ratchet_pool_leaves_total", role=self.role, reason="died")
        if not self.was_complete and not self.ready:
            self._fail(RoleError(f"start: {replica.name} died: {reason}"), error)
        self._emit(replica, "died", reason=reason, seconds=replica.lasted_s, calls=replica.calls_lost)
        if too_many:
            message = (
                f"{self.role} died {MAX_DEATHS} times of the same cause, and answered no call in between: {reason}; "
                "fix the cause, and continue with --resume"
            )
            self._fail(RoleError(message), error)
        if self._failure is None:  # otherwise the error is the cause of the failure, which is shown with its traceback
            drop_tracebacks(error)

    def _check_shortage(self, limit_s: float) -> bool:
        """Fails the pool, and returns True, if fewer than `min` replicas have been ready for `limit_s`."""
        ready = len(self.ready)
        if ready >= self._cfg.min:
            self._short_since, self.was_complete = None, True
            return False
        if self._short_since is None:
            self._short_since = time.monotonic()
        if time.monotonic() - self._short_since <= limit_s:
            return False
        states = ", ".join(f"{replica.name} {replica.state}" for replica in self.replicas) or "none"
        last = self._deaths.last_error
        longer = "" if self.was_complete else ", raise ray.startup_timeout_s if nodes are still to come,"
        died = f"; the last one died of: {self.last_death}" if last else ""
        message = (
            f"{self.role}: for {limit_s:g} s only {ready} replicas were ready, but at least {self._cfg.min} (min) are "
            f"needed; there are: {states}{died}. Free some resources, add nodes{longer} or lower min, and continue "
            "with --resume"
        )
        self._fail(UserError(message), last)
        return True

    def _fail(self, error: Exception, cause: BaseException | None) -> None:
        """Raises the error in every waiting and every later call. Later failures do not replace the first one."""
        error.__cause__ = cause
        self._failure = self._failure or error
        self._router.fail(self._failure)

    def _emit(self, replica: Replica, event: str, **details: Any) -> None:
        with suppress(OSError):  # a full disk, for example: failing to record an event must not cost a replica
            self._on_event(PoolEvent(self.role, replica.name, event, node=replica.node, **details))
