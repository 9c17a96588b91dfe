"""Sends each call to one replica of a role, and to another one if that replica dies.

Runs in the driver. A pool has a `Membership` (the lives of its replicas) and a `Router` (which one gets a call).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

from actors.pool.host import Host
from actors.pool.membership import TICK_S, CatchUp, HandOver, Membership, OnEvent
from actors.pool.replica import Replica
from actors.pool.routing import Router
from actors.pool.time_limits import TimeLimits
from common.config.base import Pooled
from common.errors import GivenUpError, RoleError, RolloutLostError
from common.metrics import meters
from common.precedence import Precedence

Call = Callable[[Any], Awaitable[Any]]  # starts a call, given the handle of a replica

# After this many replicas died while running a call, the call is a suspect: it is tried once more on a replica that
# runs nothing else. If that one dies too, the call is given up. Before that, another call may have been the cause.
SUSPECT_AFTER = 2


@dataclass
class Preferred:
    """The replica that answered the newest call of an episode. It may still have the tokens of that call in its cache,
    which makes the next call cheaper. The episode's calls share one of these; `Pool.call` reads and sets it."""

    number: int | None = None  # None before the first answer


class _Lost(Exception):
    """The replica of a call is gone. `by_death`: True if it died, perhaps because of this call; False if it had ended
    already or was told to leave."""

    def __init__(self, *, by_death: bool) -> None:
        self.by_death = by_death


class Pool:
    """Sends each call to the least loaded replica, and to another one if that replica dies. Each replica has at most
    `in_flight` calls at once. Further calls wait here. Their time limit starts when a replica gets them."""

    def __init__(
        self,
        host: Host,
        cfg: Pooled,
        *,
        on_event: OnEvent = lambda event: None,
        catch_up: CatchUp | None = None,
        hand_over: HandOver | None = None,
    ) -> None:
        """`catch_up` and `hand_over`: see Membership."""
        self.role, self.host = host.role, host
        self._cfg = cfg
        self._router = Router(cfg.in_flight)
        self.members = Membership(host, cfg, self._router, on_event=on_event, catch_up=catch_up, hand_over=hand_over)
        self.limits = TimeLimits()
        self._trying_alone = asyncio.Lock()  # held by the suspect that is tried alone

    async def start(self, timeout_s: float, precedence: Precedence | None = None) -> Self:
        """Returns when `min` replicas are ready. `precedence` and errors: see `Membership.start`."""
        await self.members.start(timeout_s, precedence or Precedence())
        return self

    def stop(self) -> None:
        """Kills every replica."""
        self.members.stop()

    @property
    def ready(self) -> list[Replica]:
        """The replicas that serve calls."""
        return self.members.ready

    async def call(
        self,
        what: str,
        call: Call,
        *,
        cost: int = 1,
        prefer: Preferred | None = None,
        limit_s: float | None = None,
    ) -> Any:
        """The answer of the least loaded replica. `what` names the call in messages; `cost` is its share of a replica's
        load.

        `prefer` names the replica that gets the call if it has room and is not overloaded (see `Router.acquire`).
        Afterwards it names the replica that answered. `limit_s` replaces the config's timeout_s. math.inf means no
        limit, for a call whose parts have their own limits.

        Raises RoleError if the answer takes too long, and RolloutLostError if a referenced argument is gone. Raises
        GivenUpError if SUSPECT_AFTER replicas died while running the call, and then one that ran nothing else. Raises
        the pool's own failure if the pool has failed.
        """
        deaths = 0
        while deaths <= SUSPECT_AFTER:
            suspect = deaths == SUSPECT_AFTER
            if suspect:
                await self._trying_alone.acquire()
            try:
                number = await self._router.acquire(cost, prefer.number if prefer else None)
                answer = await self._try(number, what, call, cost, limit_s, alone=suspect)
                if prefer:
                    prefer.number = number
                return answer
            except _Lost as lost:
                deaths += lost.by_death
            finally:
                if suspect:
                    self._trying_alone.release()
        why = f"{what}: {deaths} {self.role} replicas died while running it: {self.members.last_death}"
        raise GivenUpError(why, role=self.role)

    async def _try(self, number: int, what: str, call: Call, cost: int, limit_s: float | None, *, alone: bool) -> Any:
        """The answer of the replica that the router chose; with `alone`, once it has no other calls. Raises _Lost."""
        replica = self.members.find(number)
        if replica is None:
            raise _Lost(by_death=False)  # it ended between the router's choice and now
        replica.idle.clear()
        try:
            if alone:
                self.members.suspend(replica, "a suspect is tried alone")
                while self._router.calls(number) > 1 and not replica.ended:
                    await asyncio.sleep(TICK_S)
            had_ended = replica.ended
            answer = await self.ask(replica, what, call, limit_s)
            self.members.answered()
            return answer
        except self.host.losses as error:
            replica.tried_alone = alone and not had_ended
            self.members.lose(replica, error)
            meters.count("ratchet_pool_reissues_total", role=self.role)
            raise _Lost(by_death=not had_ended and replica.state == "dead") from error
        finally:
            self._router.release(number, cost)
            if not self._router.calls(number):
                replica.idle.set()
            if alone:
                self.members.resume(replica, "a suspect is tried alone")

    async def each(self, work: Callable[[Replica], Awaitable[Any]]) -> dict[str, Any]:
        """The result of `work` for every ready replica, by name. A replica that dies meanwhile leaves the pool. Other
        errors are raised."""

        async def answer(replica: Replica) -> Any:
            try:
                return await work(replica)
            except Exception as error:
                # Returned, because a task that raises it keeps the traceback, whose frames refer to the weights that
                # the replica was sent. `ask`'s frame refers to the task, so nothing would ever free them.
                return error

        asked = self.ready
        answers = await asyncio.gather(*map(answer, asked), return_exceptions=True)
        results = {}
        for replica, result in zip(asked, answers, strict=True):
            if isinstance(result, self.host.losses):
                self.members.lose(replica, result)
            elif isinstance(result, BaseException):
                raise result
            else:
                results[replica.name] = result
        return results

    async def ask(self, replica: Replica, what: str, call: Call, limit_s: float | None = None) -> Any:
        """One replica's answer. Raises RoleError when it takes longer than `limit_s` (if left out: timeout_s),
        RolloutLostError if a referenced argument is gone."""
        return await self.in_time(what, call(replica.handle), limit_s, name=replica.name)

    async def in_time(self, what: str, answer: Awaitable[Any], limit_s: float | None = None, *, name: str = "") -> Any:
        """Awaits an answer of the replica `name`, and raises as `ask` does."""
        name = name or f"one of the {self.role} replicas"
        seconds, setting = (self._cfg.timeout_s, " (timeout_s)") if limit_s is None else (limit_s, "")
        try:
            async with self.limits.limit(seconds) as limit:
                return await answer
        except self.host.lost_values as error:
            raise RolloutLostError(f"{what}: an argument of {name} is lost: {error}") from error
        except TimeoutError as error:
            if not limit.expired():
                raise  # the role itself raised this TimeoutError
            raise RoleError(
                f"{name} did not {what} within {seconds:g} s{setting}; find out what blocks it, "
                "or raise the limit, and continue with --resume"
            ) from error
