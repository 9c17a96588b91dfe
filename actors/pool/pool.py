"""The replicas of a role behind one async method: a call goes to one of them, and elsewhere if that one dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from actors.pool.membership import TICK_S, Host, Membership, Replica, death_reason
from common.config.base import Replicated
from common.errors import GivenUpError, RoleError, RolloutLostError
from common.metrics import meters

Call = Callable[[Any], Awaitable[Any]]  # given a replica's handle, starts the call

# A call that so many replicas died over is tried once more on a replica that has nothing else: if that dies too, the
# call is the cause. Before, it may be the victim of another.
SUSPECT_AFTER = 2


class _Lost(Exception):
    """A replica is gone and its answer with it; `over_it`: it may have died of this call."""

    def __init__(self, *, over_it: bool) -> None:
        self.over_it = over_it


class Pool(Membership):
    """A call goes to the least loaded replica; if that dies, to another one. At most `in_flight` calls are with a
    replica at a time; the others wait here, where no time limit runs."""

    def __init__(self, role: str, host: Host, cfg: Replicated, **kwargs: Any) -> None:
        super().__init__(role, host, cfg, **kwargs)
        self._suspects = asyncio.Lock()  # held by the one that is tried alone

    async def call(self, what: str, call: Call, *, cost: int = 1) -> Any:
        """The answer of the least loaded replica. Raises RoleError when it takes too long, GivenUpError when it takes
        replica after replica with it, the last one of which had nothing else."""
        losses = 0
        while losses <= SUSPECT_AFTER:
            suspected = losses == SUSPECT_AFTER
            if suspected:
                await self._suspects.acquire()  # waits until no other call is tried alone
            try:
                number = await self._router.acquire(cost)
                return await self._try(number, what, call, cost, alone=suspected)
            except _Lost as lost:
                losses += lost.over_it
            finally:
                if suspected:
                    self._suspects.release()
        raise GivenUpError(f"{what}: {losses} {self.role} replicas died over it: {death_reason(self._last_error)}")

    async def _try(self, number: int, what: str, call: Call, cost: int, *, alone: bool) -> Any:
        """The answer of the replica whose turn was taken, which has nothing else if `alone`. Raises _Lost."""
        replica = self._replicas.get(number)
        if replica is None:
            raise _Lost(over_it=False)  # it died before its turn was taken
        replica.idle.clear()
        try:
            if alone:
                self.suspend(replica)
                while self._router.calls(number) > 1 and not replica.gone.done():
                    await asyncio.sleep(TICK_S)
            was_gone = replica.gone.done()
            answer = await self.ask(replica, what, call)
            self._answered()
            return answer
        except self._losses as error:
            replica.tried_alone = alone and not was_gone
            self.lose(replica, error)
            meters.count("ratchet_pool_reissues_total", role=self.role)
            was_told_to_go = replica.gone.exception() is None
            raise _Lost(over_it=not (was_gone or was_told_to_go)) from error
        finally:
            self._router.release(number, cost)
            if not self._router.calls(number):
                replica.idle.set()
            if alone:
                self.resume(replica)

    async def each(self, work: Callable[[Replica], Awaitable[Any]]) -> dict[str, Any]:
        """What `work` returns for every ready replica. One that dies over it leaves; other errors are raised."""
        asked = self.ready
        answers = await asyncio.gather(*(work(replica) for replica in asked), return_exceptions=True)
        for replica, answer in zip(asked, answers, strict=True):
            if isinstance(answer, self._losses):
                self.lose(replica, answer)
            elif isinstance(answer, BaseException):
                raise answer
        return {
            replica.name: answer
            for replica, answer in zip(asked, answers, strict=True)
            if not isinstance(answer, BaseException)
        }

    async def ask(self, replica: Replica, what: str, call: Call) -> Any:
        """One replica's answer. Raises RoleError when it takes too long, RolloutLostError if what it was given is
        gone."""
        try:
            async with asyncio.timeout(self._cfg.timeout_s) as limit:
                return await call(replica.handle)
        except self.host.lost_values as error:
            raise RolloutLostError(f"{what}: what {replica.name} was given is lost: {error}") from error
        except TimeoutError as error:
            if not limit.expired():
                raise  # the role's own
            raise RoleError(
                f"{replica.name} did not finish to {what} within {self._cfg.timeout_s:g} s (timeout_s); see what keeps "
                "it, or raise the limit, and go on with --resume"
            ) from error

    def suspend(self, replica: Replica) -> None:
        """It gets no new calls until `resume`."""
        self._router.close(replica.number)

    def resume(self, replica: Replica) -> None:
        if replica.state == "ready" and not replica.gone.done():
            self._router.open(replica.number)
