"""Bounded slots between admission and consumption: what is in flight, and which rollouts make the next batch."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from common.errors import RolloutLostError, UserError
from common.types import Experience, ExperienceRef, Void


@dataclass
class Slot:
    """A rollout between its admission and its cut; times are seconds on the buffer's clock."""

    admitted: float
    finished: float = 0.0
    outcome: ExperienceRef | None = None


@dataclass(frozen=True)
class Batch:
    """What a step learns from, what was given up since the batch before, and where the time went."""

    experience: list[Experience]
    voids: list[Void]
    stats: dict[str, float]


class RolloutBuffer:
    """At most `(max_staleness + 1) * rollouts_per_step` rollouts exist between `admit` and `release`.

    Batches are cut in admission order, so short responses are not favoured. When a rollout is admitted, it and all
    before it that are not cut yet fit into these slots, so under version v it is in the batch of version v +
    max_staleness at the latest. With max_staleness 0 that is synchronous PPO: a batch's slots are freed only when the
    generators hold the weights that came of it.

    Rollouts that the next batch does not need are admitted only while all together, those in flight counted with
    `rollout_bytes` each, take no more than `max_bytes`. Beyond `wanted`, what all batches to come hold, none is.
    """

    def __init__(
        self,
        rollouts_per_step: int,
        max_staleness: int,
        *,
        fetch: Callable[[Sequence[ExperienceRef]], Awaitable[Sequence[Experience | RolloutLostError]]],
        wanted: float = float("inf"),
        max_void_share: float = 1.0,
        max_bytes: float = float("inf"),
        rollout_bytes: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._batch_size = rollouts_per_step
        self._fetch = fetch
        self._wanted = wanted
        self._max_void_share = max_void_share
        self._free = (max_staleness + 1) * rollouts_per_step
        self._max_staleness = max_staleness
        self._max_bytes, self._rollout_bytes = max_bytes, rollout_bytes
        self._clock = clock
        self._next_ticket = 0
        # Admitted and neither cut nor void, in order of admission. A dict would pass over the places of all that were
        # cut before to find its first.
        self._slots: OrderedDict[int, Slot] = OrderedDict()
        self._blocking: int | None = None  # a ticket among the oldest that was seen unfinished, and still may be
        self._in_flight = 0
        self._bytes = 0  # of those that are finished
        self._voids: list[Void] = []
        self._scored = self._broken = 0  # since the last cut: finished, and void for another reason than age
        self._idle_since: float | None = None  # since when nothing is in flight
        self._idle = 0.0
        self._changed = asyncio.Condition()

    async def admit(self) -> int:
        """A ticket, once there is a slot and room for it. Woken by `release`, cuts and voids."""
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            self._free -= 1
            self._next_ticket += 1
            self._slots[self._next_ticket] = Slot(self._clock())
            self._fly(1)
            return self._next_ticket

    async def put(self, ticket: int, outcome: ExperienceRef | Void) -> None:
        """How the rollout of this ticket ended. A void gives its slot back at once."""
        async with self._changed:
            if isinstance(outcome, Void):
                self._broken += 1
                self._void(ticket, outcome)
            else:
                slot = self._slots[ticket]
                slot.finished, slot.outcome = self._clock(), outcome
                self._bytes += outcome.num_bytes
                self._scored += 1
            self._fly(-1)
            self._changed.notify_all()

    async def take(self, count: int, policy_version: int) -> Batch:
        """The first `count` rollouts in admission order, and every void since the last call.

        Waits for the oldest ones to finish, however many younger ones already have, and fetches what they wrote: only
        now do their tokens come here. A rollout whose oldest token is more than max_staleness versions behind
        `policy_version` is voided, whatever let it through before, and so is one whose tokens are lost; their prompts
        are to be asked again. Raises UserError when voids of other reasons pass the configured share: a broken reward
        would otherwise go on for ever.
        """
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._oldest_finished(count) or self._too_many_voids(count))
                if self._too_many_voids(count):
                    reason = next(void.reason for void in reversed(self._voids) if not void.asked_again)
                    raise UserError(
                        f"{self._broken} of {self._broken + max(count, self._scored)} rollouts were voided, more than "
                        f"reward.max_void_share ({self._max_void_share:.0%}) allows; the last reason: {reason}; fix it "
                        "and continue with --resume, or raise reward.max_void_share"
                    )
                oldest = [(ticket, slot.outcome) for ticket, slot in islice(self._slots.items(), count) if slot.outcome]
            unusable: dict[int, str] = {}
            for ticket, row in oldest:
                if row.staleness(policy_version) > self._max_staleness:
                    unusable[ticket] = f"its oldest token is more than {self._max_staleness} versions old"
            rows: Sequence[Experience | RolloutLostError] = []
            if not unusable:
                rows = await self._fetch([row for _, row in oldest])
                lost = (pair for pair in zip(oldest, rows, strict=True) if isinstance(pair[1], RolloutLostError))
                unusable = {ticket: str(error) for (ticket, _), error in lost}
            async with self._changed:
                for ticket, reason in unusable.items():
                    self._ask_again(ticket, reason)
                self._changed.notify_all()  # there is more room
                if not unusable:
                    return self._cut([row for row in rows if isinstance(row, Experience)])

    async def release(self, count: int) -> None:
        """Frees the slots of a batch. Called after publication, so that no rollout is born stale."""
        async with self._changed:
            self._free += count
            self._changed.notify_all()

    def num_finished(self, count: int) -> int:
        """How many of the `count` oldest rollouts are written and scored."""
        return sum(slot.outcome is not None for slot in islice(self._slots.values(), count))

    def _has_room(self) -> bool:
        if not self._free or len(self._slots) >= self._wanted:
            return False
        # Never fewer than the next batch needs, or it would wait for ever.
        taken = self._bytes + (self._in_flight + 1) * self._rollout_bytes
        return len(self._slots) < self._batch_size or taken <= self._max_bytes

    def _oldest_finished(self, count: int) -> bool:
        if len(self._slots) < count:
            return False
        if (blocking := self._slots.get(self._blocking or 0)) is not None and not blocking.outcome:
            return False  # most of the time: the slots are not all looked at for each that finishes
        unfinished = (ticket for ticket, slot in islice(self._slots.items(), count) if not slot.outcome)
        self._blocking = next(unfinished, None)
        return self._blocking is None

    def _too_many_voids(self, count: int) -> bool:
        return self._broken > self._max_void_share * (self._broken + max(count, self._scored))

    def _ask_again(self, ticket: int, reason: str) -> None:
        row = self._slots[ticket].outcome
        if row is not None:
            self._bytes -= row.num_bytes
            self._void(ticket, Void(row.written.sample_id, reason, asked_again=True))

    def _void(self, ticket: int, void: Void) -> None:
        del self._slots[ticket]
        self._voids.append(void)
        self._free += 1

    def _cut(self, rows: list[Experience]) -> Batch:
        """Of the oldest slots, which these rows were in."""
        count = len(rows)
        slots = [self._slots.pop(ticket) for ticket in list(islice(self._slots, count))]
        self._wanted -= count
        self._bytes -= sum(slot.outcome.num_bytes for slot in slots if slot.outcome)
        now = self._clock()
        idle = self._idle + (now - self._idle_since if self._idle_since is not None else 0.0)
        stats = {
            "staleness/generating_s": sum(slot.finished - slot.admitted for slot in slots) / count,
            "staleness/buffered_s": sum(now - slot.finished for slot in slots) / count,
            "wait/generators_s": idle,
        }
        if self._idle_since is not None:
            self._idle_since = now
        self._idle = 0.0
        voids, self._voids = self._voids, []
        self._scored = self._broken = 0
        return Batch(rows, voids, stats)

    def _fly(self, change: int) -> None:
        """Counts what is in flight, and for how long nothing was."""
        self._in_flight += change
        if self._in_flight == 0:
            self._idle_since = self._clock()
        elif self._idle_since is not None:
            self._idle += self._clock() - self._idle_since
            self._idle_since = None
