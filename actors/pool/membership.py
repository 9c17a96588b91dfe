"""Who is in a pool: replicas of a role join, catch up, serve, and leave or die, while calls go on.

A replica's life is one coroutine. Nothing here knows of Ray: `Host` says what is needed of whatever runs replicas.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from actors.pool.routing import Router
from common.config.base import Replicated
from common.errors import EngineDeadError, UserError
from common.errors import RoleError as RoleError
from common.metrics import meters

STATES = ("pending", "starting", "ready", "leaving")  # of a replica: waits for room; loads; serves; finishes
# Creations that wait for room on the cluster at a time: a demand that an autoscaler sees, and no flood of it.
MAX_PENDING = 2
# This many deaths of one cause, with no call answered between them, end the run: replacements would die of it too.
MOST_DEATHS = 3
# How often a pool looks at its cluster and its own size, seconds.
TICK_S = 0.5
# Pause before the first replacement of a replica that died, doubled by each further death up to the longest, seconds.
# A replica that has served for as long as the longest pause ends the series.
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0


# What differs between two deaths of one cause: addresses, process ids, counts.
_NUMBERS = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|\d+")


class Host(Protocol):
    """What runs replicas. Handles are its own; a role's methods are called on them as `handle.method.remote(...)`."""

    losses: tuple[type[BaseException], ...]  # what a call raises whose replica is gone
    lost_values: tuple[type[BaseException], ...]  # what it raises if a value it was given by reference is gone
    outages: type[BaseException]  # what `node` and `leaving_nodes` raise while the cluster cannot answer

    def create(self, name: str) -> Any:
        """A handle, at once; the replica may have to wait for room, for ever if need be."""

    def kill(self, handle: Any) -> None: ...

    async def node(self, handle: Any) -> str | None:
        """Where it runs; None while it waits for room."""

    async def leaving_nodes(self) -> Mapping[str, float]:
        """Nodes that must not be counted on any more, with the seconds until they are gone."""

    def probe(self, handle: Any) -> Awaitable[Any]:
        """Answered by the replica's process however busy its role is."""

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        """The values that calls have left where they ran; a RolloutLostError in place of one that is gone. What
        is no reference stands for itself."""


@dataclass(frozen=True)
class PoolEvent:
    """Something that a person watching the pool wants to know."""

    role: str
    replica: str
    event: str  # "joined", "leaving", "left" or "died"
    reason: str = ""
    node: str | None = None
    seconds: float = 0.0  # joined: since it had room; left: since it joined
    calls: int = 0  # it had so many when it left or died: they are asked again, or handed on


OnEvent = Callable[[PoolEvent], None]


@dataclass(eq=False)
class Replica:
    """One member of a pool, from its creation to its end."""

    number: int  # never used again
    name: str
    handle: Any
    state: str = "pending"  # one of STATES
    node: str | None = None
    since: float = field(default_factory=time.monotonic)  # in this state
    version: int | None = None  # of the learner's weights that it has verified and holds; None: those of the files
    calls_lost: int = 0  # what it had when it died
    tried_alone: bool = False  # it died over a call that was tried alone, which is then given up
    gone: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self, state: str) -> float:
        """Returns the seconds spent in the state before."""
        now = time.monotonic()
        spent, self.state, self.since = now - self.since, state, now
        return spent


class Membership:
    """Between `cfg.min` and `cfg.max` replicas of one role, as many as are wished for and the cluster has room for.

    A replica is dead when its connection breaks or its process answers no probe for `probe_timeout_s`, never because a
    call
    is slow. Dead ones are replaced after a growing pause.
    """

    def __init__(self, role: str, host: Host, cfg: Replicated, *, on_event: OnEvent = lambda event: None) -> None:
        self.role = role
        self.host = host
        self.wish = cfg.max_replicas
        # Brings a new replica to where the others are; returns only when it may be called.
        self.catch_up: Callable[[Replica], Awaitable[None]] = _nothing_to_catch_up
        # Has a replica end what it is at, with what it has. Left out: it finishes, or others begin again.
        self.hand_over: Callable[[Any], Awaitable[Any]] | None = None
        self._losses: tuple[type[BaseException], ...] = (EngineDeadError, *host.losses)
        self._cfg = cfg
        self._on_event = on_event
        self._router = Router(cfg.in_flight)  # closed for whoever is not ready
        self._replicas: dict[int, Replica] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self._backoff = 0.0
        self._not_before = 0.0  # no creation
        self._short_since: float | None = time.monotonic()  # since when fewer than `min` are ready
        self._ever_complete = False  # `min` were ready at some time
        self._leaving: Mapping[str, float] = {}
        self._last_error: BaseException | None = None
        self._deaths: list[str] = []  # causes, since a call was last answered; all the same
        self._given_up = False  # since then a call has been given up
        self._failure: asyncio.Future[None] | None = None

    async def start(self, timeout_s: float) -> Self:
        """Returns when `min` replicas are ready. Raises UserError if that takes too long, RoleError if one dies before
        any was ready."""
        self._failure = asyncio.get_running_loop().create_future()
        self._startup_timeout_s = timeout_s
        meters.count("ratchet_pool_joins_total", 0, role=self.role)
        meters.count("ratchet_pool_reissues_total", 0, role=self.role)
        meters.count("ratchet_pool_leaves_total", 0, role=self.role, reason="died")
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._supervised)
        while len(self) < self._cfg.min:
            if self._failure.done():
                self.stop()
                await self._failure
            await asyncio.sleep(0.05)
        return self

    def __len__(self) -> int:
        """Replicas that are ready."""
        return len(self.ready)

    @property
    def least(self) -> int:
        """Replicas that the run needs."""
        return self._cfg.min

    @property
    def replicas(self) -> list[Replica]:
        return list(self._replicas.values())

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.state == "ready"]

    def stop(self) -> None:
        """Ends every replica, and frees what it reserved."""
        self._supervisor.cancel()
        for life in self._lives:
            life.cancel()
        for replica in self._replicas.values():
            self.host.kill(replica.handle)
        self._replicas.clear()

    def lose(self, replica: Replica, error: BaseException) -> None:
        """It is dead: out of the routing table at once, and to be replaced."""
        if not replica.gone.done():
            self._router.close(replica.number)
            replica.calls_lost = self._router.calls(replica.number)
            replica.gone.set_exception(error)
            replica.gone.exception()  # it is asked for by the replica's life, if that still goes on

    async def _supervise(self) -> None:
        """Keeps as many replicas alive as are wished for; ends the pool when too few are left for too long. Woken by
        the clock alone."""
        while True:
            for replica in self.replicas:
                await self._look_at(replica)
            with suppress(self.host.outages):  # of the cluster's directory: what was known still holds
                self._leaving = await self.host.leaving_nodes()
            for replica in self._replicas.values():
                if replica.node in self._leaving:
                    self._dismiss(replica, "its node is leaving")
            staying = [replica for replica in self._replicas.values() if not replica.gone.done()]
            for replica in _least_needed(staying, self._router)[: max(0, len(staying) - self.wish)]:
                self._dismiss(replica, "fewer are wished for")
            pending = sum(replica.state == "pending" for replica in staying)
            room = min(self.wish - len(staying), MAX_PENDING - pending)
            if time.monotonic() >= self._not_before:
                for _ in range(room):
                    self._create()
            for state in STATES:
                number = sum(replica.state == state for replica in self._replicas.values())
                meters.gauge("ratchet_pool_replicas", number, role=self.role, state=state)
            meters.gauge("ratchet_pool_waiting_calls", self._router.num_waiting, role=self.role)
            if self._too_few(self._cfg.max_shortage_s if self._ever_complete else self._startup_timeout_s):
                return
            await asyncio.sleep(TICK_S)

    def _supervised(self, supervisor: asyncio.Task[None]) -> None:
        if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
            self._fail(RoleError(f"the pool of {self.role} replicas broke: {error}"), error)

    async def _look_at(self, replica: Replica) -> None:
        if replica.state == "pending":
            with suppress(self.host.outages):
                replica.node = await self.host.node(replica.handle)
            if replica.node is not None and replica.state == "pending":  # nobody was quicker
                replica.enter("starting")
        elif replica.state == "starting" and time.monotonic() - replica.since > self._startup_timeout_s:
            limit = f"{self._startup_timeout_s:g} s (ray.startup_timeout_s)"
            self.lose(replica, RoleError(f"{replica.name} did not start within {limit}"))

    def _create(self) -> None:
        taken = {replica.name for replica in self._replicas.values()}
        index = next(i for i in range(len(taken) + 1) if f"{self.role}({i})" not in taken)
        self._numbers += 1
        name = f"{self.role}({index})"
        replica = Replica(self._numbers, name, self.host.create(name))
        self._replicas[replica.number] = replica
        life = asyncio.create_task(self._live(replica))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)

    async def _live(self, replica: Replica) -> None:
        """A replica from its creation to its end, which `gone` says: a result if it was told to go, else an error."""
        joined = False
        try:
            joined = await _unless_gone(self._join(replica), replica)
            probing = asyncio.create_task(self._probe(replica))
            try:
                reason = await asyncio.shield(replica.gone)
            finally:
                probing.cancel()
            await self._leave(replica, reason)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # it died, or never came to life: its work goes elsewhere, and another one comes
            self._bury(replica, error, joined)
        finally:
            self._router.forget(replica.number)
            self._replicas.pop(replica.number, None)
            self.host.kill(replica.handle)  # an engine may be dead in a process that lives

    async def _join(self, replica: Replica) -> None:
        await replica.handle.ready.remote()
        await self._look_at(replica)
        await self.catch_up(replica)
        seconds = replica.enter("ready")
        self._ever_complete |= len(self) >= self._cfg.min
        self._router.open(replica.number)
        self._tell(replica, "joined", seconds=seconds)
        meters.count("ratchet_pool_joins_total", role=self.role)
        meters.observe("ratchet_pool_startup_seconds", seconds, role=self.role)

    async def _leave(self, replica: Replica, reason: str) -> None:
        """No new work; what it has it finishes, or hands over when its time is up."""
        if replica.state != "ready":
            return  # it never was routable
        self._router.close(replica.number)
        served = replica.enter("leaving")
        calls = self._router.calls(replica.number)
        self._tell(replica, "leaving", reason=reason, calls=calls)
        time_left = self._leaving.get(replica.node or "", float("inf"))
        if calls:
            # Handing over takes time, too.
            limit = min(self._cfg.drain_s, time_left / 2)
            calls = await self._finish(replica, limit)
            if calls and self.hand_over is not None:
                with suppress(TimeoutError, *self._losses):
                    async with asyncio.timeout(self._cfg.drain_s):
                        await self.hand_over(replica.handle)
                        await replica.idle.wait()
        self._tell(replica, "left", reason=reason, seconds=served, calls=calls)
        meters.count("ratchet_pool_leaves_total", role=self.role, reason=reason)

    async def _finish(self, replica: Replica, limit_s: float) -> int:
        """Waits until it has no calls any more; returns how many it still has when time is up."""
        try:
            await asyncio.wait_for(replica.idle.wait(), limit_s)
        except TimeoutError:
            return self._router.calls(replica.number)
        return 0

    async def _probe(self, replica: Replica) -> None:
        """Loses the replica when its process is silent. A slow answer to a call says nothing."""
        limit = self._cfg.probe_timeout_s
        while not replica.gone.done():
            await asyncio.sleep(limit / 4)
            try:
                await asyncio.wait_for(self.host.probe(replica.handle), limit)
            except TimeoutError:
                self.lose(
                    replica, RoleError(f"{replica.name} answered no health probe for {limit:g} s (probe_timeout_s)")
                )
            except Exception as error:
                self.lose(replica, error)

    def _dismiss(self, replica: Replica, reason: str) -> None:
        if not replica.gone.done():
            replica.gone.set_result(reason)

    def _bury(self, replica: Replica, error: BaseException, joined: bool) -> None:
        self._last_error = error
        served = time.monotonic() - replica.since
        self._backoff = BACKOFF_S if joined and served > MAX_BACKOFF_S else min(2 * self._backoff, MAX_BACKOFF_S)
        self._backoff = max(self._backoff, BACKOFF_S)
        self._not_before = time.monotonic() + self._backoff
        meters.count("ratchet_pool_leaves_total", role=self.role, reason="died")
        reason = death_reason(error)
        if not self._ever_complete and not self.ready:
            self._fail(RoleError(f"start: {replica.name} died: {reason}"), error)
        self._tell(replica, "died", reason=reason, seconds=served, calls=replica.calls_lost)
        if self._dies_again(replica, reason):
            self._fail(
                RoleError(
                    f"{self.role} died {MOST_DEATHS} times of the same cause, and answered no call in between: "
                    f"{reason}; fix the cause, and continue with --resume"
                ),
                error,
            )

    def _dies_again(self, replica: Replica, reason: str) -> bool:
        """Whether this death is one too many. The first call that is given up is taken for the cause of its death: one
        sample that ends every process must not end the run."""
        if replica.tried_alone and not self._given_up:
            self._given_up = True
            return False
        cause = _NUMBERS.sub("", reason)
        self._deaths = [*self._deaths, cause] if cause in self._deaths else [cause]
        return len(self._deaths) >= MOST_DEATHS

    def _answered(self) -> None:
        """A call was answered: the deaths so far do not keep the role from its work."""
        self._deaths.clear()
        self._given_up = False

    def _too_few(self, limit: float) -> bool:
        """Fails the pool if fewer than `min` have been ready for `limit` seconds."""
        ready = len(self)
        if ready >= self._cfg.min:
            self._short_since, self._ever_complete = None, True
        elif self._short_since is None:
            self._short_since = time.monotonic()
        elif time.monotonic() - self._short_since > limit:
            states = ", ".join(f"{replica.name} {replica.state}" for replica in self._replicas.values()) or "none"
            died = f"; the last one died of: {death_reason(self._last_error)}" if self._last_error else ""
            self._fail(
                UserError(
                    f"{self.role}: for {limit:g} s only {ready} replicas were ready, at least {self._cfg.min} (min) "
                    f"are needed; there are: {states}{died}. Give it room or lower min, and go on with --resume"
                ),
                self._last_error,
            )
            return True
        return False

    def _fail(self, error: Exception, cause: BaseException | None) -> None:
        error.__cause__ = cause
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()
        self._router.fail(error)

    def _tell(self, replica: Replica, event: str, **details: Any) -> None:
        with suppress(OSError):  # it could not be written down or shown, which is no reason to lose a replica
            self._on_event(PoolEvent(self.role, replica.name, event, node=replica.node, **details))


async def _nothing_to_catch_up(replica: Replica) -> None:
    pass


async def _unless_gone(work: Any, replica: Replica) -> bool:
    """Awaits `work`, but ends it when the replica is gone. Returns whether it was done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, replica.gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return task.done()
    finally:
        task.cancel()


def _least_needed(replicas: list[Replica], router: Router) -> list[Replica]:
    """Those first that would be missed least: not ready yet, then the least loaded, then the newest."""
    return sorted(replicas, key=lambda r: (STATES.index(r.state), router.cost(r.number), -r.number))


def death_reason(error: BaseException | None) -> str:
    """Why a process died, in one line: the last one of the message. Ray's own texts are paragraphs, or end with a line
    that says nothing."""
    if "The actor is dead because its worker process has died" in str(error):
        pid = re.search(r"\bpid: (\d+)", str(error))
        code = re.search(r"exit code (\d+)", str(error))
        how = f"ended with exit code {code[1]}" if code else "was killed by a signal, for want of memory, or crashed"
        return f"its process{f' {pid[1]}' if pid else ''} {how}"
    lines = [line for line in str(error).splitlines() if line.strip() and "unexpected internal error" not in line]
    return lines[-1].strip() if lines else type(error).__name__
