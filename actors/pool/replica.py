"""One replica of a role: its state, and the events that people see. Runs in the driver."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

# The states of a living replica, in order: it waits for room, loads, serves, finishes its last calls. "dead" may follow
# each of them except "leaving".
STATES = ("pending", "starting", "ready", "leaving")


@dataclass(frozen=True)
class PoolEvent:
    """A change in a pool that the user should see."""

    role: str
    replica: str
    event: str  # "joined", "leaving", "left" or "died"
    reason: str = ""
    node: str | None = None
    seconds: float = 0.0  # joined: since it had room; left: since it joined; died: in its last state
    calls: int = 0  # calls that it had when it began to leave, left or died; if it left or died, others get them


@dataclass(eq=False)
class Replica:
    """One member of a pool. It goes through STATES in order, unless it is told to leave earlier or dies."""

    number: int  # never used again
    name: str
    handle: Any = None  # None until it is created
    state: str = "pending"
    since: float = field(default_factory=lambda: time.monotonic())  # start of this state; tests replace the clock
    began: float = 0.0  # when it found room; until then, when it was created
    lasted_s: float = 0.0  # duration of the previous state
    node: str | None = None
    joined: bool = False  # it was ready at some time
    reason: str = ""  # why it was told to leave
    leave_by: float = math.inf  # when a leaving replica must hand over its calls; time.monotonic
    error: BaseException | None = None  # why it died
    version: int | None = None  # version of the learner's weights that it holds; None: the weights of the model's files
    killed: bool = False  # the order to kill its process was given
    calls_lost: int = 0  # calls it had when it died
    tried_alone: bool = False  # it died while it ran only one call, the suspect of `Pool.call`
    suspended_for: set[str] = field(default_factory=set)  # reasons why it gets no new calls although it is ready
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # it has no calls
    _ended: asyncio.Event = field(default_factory=asyncio.Event)  # it is leaving or dead

    def __post_init__(self) -> None:
        self.began = self.since

    def enter(self, state: str) -> None:
        """Changes the state now."""
        now = time.monotonic()
        self.lasted_s, self.state, self.since = now - self.since, state, now
        if state == "starting":
            self.began = now
        if self.ended:
            self._ended.set()

    @property
    def ended(self) -> bool:
        """True if it is leaving or dead, so that it gets no new calls."""
        return self.state in ("leaving", "dead")

    async def unless_ended(self, work: Awaitable[None]) -> None:
        """Runs `work`, but cancels it when the replica is told to leave or dies. Raises the error of the work, or the
        one that the replica died of."""
        task, ended = asyncio.ensure_future(work), asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            if self.error is not None:
                raise self.error
        finally:
            task.cancel()
            ended.cancel()
