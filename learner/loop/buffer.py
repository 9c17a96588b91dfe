"""Bounded slots between a prompt's admission and the step that learns from its rollouts. Runs in the driver.

A worked example with `rollouts_per_step` = 2 and `max_staleness` = 1, so 4 slots:

    version  event                                   slots, oldest first; * is generated and scored
    0        four prompts are admitted               a  b  c  d        the producer waits: no slot is free
    0        b and d are scored                      a  b* c  d*       the loop waits in `take`: a is the oldest
    0        a is scored, `take` returns a and b     c  d*             a and b still hold their slots
    1        a and b are learned from, generators
             hold version 1, `release(2)`            c  d* e  f        version 1 generates e and f
    1        c is void, its slot is free at once     d* e  f  g        g takes its place
    1        d and e make the second batch           f  g              d is 1 version old, which is allowed

Every admitted rollout holds a slot until `release`. In this example, at most 3 others are before a rollout when it is
admitted under version v. So it is learned from at version v + 1 at the latest; in general, at v + max_staleness.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from common.errors import RolloutLostError, UserError
from common.types import Experience, ExperienceRef, SampleId, Void


@dataclass
class Group:
    """The rollouts that are admitted, taken and asked again together; times are seconds on the buffer's clock."""

    admitted: float
    outcomes: list[ExperienceRef | Void | None]  # one per rollout; None while it is in flight
    finished: list[float]

    @property
    def complete(self) -> bool:
        return None not in self.outcomes

    @property
    def rows(self) -> list[ExperienceRef]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, ExperienceRef)]

    @property
    def voids(self) -> list[Void]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Void)]


@dataclass(frozen=True)
class Batch:
    """The rollouts of one step, the voids since the batch before, and where the time went."""

    experience: list[Experience]
    voids: list[Void]
    stats: dict[str, float]


class RolloutBuffer:
    """Returns batches in the order of admission, so that short responses are not favoured.

    At most `(max_staleness + 1) * rollouts_per_step` rollouts exist between `admit` and `release`. With max_staleness 0
    this is synchronous PPO: slots are freed only when generators hold the weights that came from the batch. Memory is
    bounded too: beyond the next batch, rollouts are admitted only while all of them take at most `max_bytes`, with
    `rollout_bytes` for each one in flight. `wanted` is the number of rollouts that all remaining steps will consume;
    the buffer admits no more.

    With `group_size` above 1, this many rollouts of one prompt are one group, and a group is never split over two
    batches. A batch then has `rollouts_per_step / group_size` groups. If a rollout is void and not asked again, the
    others of its group are learned from without it, and it keeps its slot. If all are void, the group leaves at once,
    and another prompt takes its place. If one rollout is asked again, its whole group is: the others would be too old
    when the new one is generated. So no group ever waits for a rollout that no generator works on.
    """

    def __init__(
        self,
        rollouts_per_step: int,
        max_staleness: int,
        *,
        fetch: Callable[[Sequence[ExperienceRef]], Awaitable[Sequence[Experience | RolloutLostError]]],
        group_size: int = 1,
        wanted: float = float("inf"),
        max_void_share: float = 1.0,
        max_bytes: float = float("inf"),
        rollout_bytes: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if rollouts_per_step % group_size:
            raise ValueError(f"rollouts_per_step ({rollouts_per_step}) must divide into groups of {group_size}")
        self._batch_size, self._group_size = rollouts_per_step, group_size
        self._fetch = fetch
        self._wanted = wanted
        self._max_void_share = max_void_share
        self._free = (max_staleness + 1) * rollouts_per_step
        self._max_staleness = max_staleness
        self._max_bytes, self._rollout_bytes = max_bytes, rollout_bytes
        self._clock = clock
        self._next_ticket = 0
        # Admitted and not taken, by ticket, in order of admission. A plain dict would scan past the places of all
        # earlier removals to find its first key; an OrderedDict does not.
        self._groups: OrderedDict[int, Group] = OrderedDict()
        self._blocking: int | None = None  # a ticket, incomplete at the last scan; no new scan until it is complete
        self._in_flight = 0
        self._bytes = 0  # of finished rollouts
        self._voids: list[Void] = []
        self._num_scored = self._num_void = 0  # rollouts that `put` has stored since the last batch
        self._last_reason = ""  # of a void
        self._idle_since: float | None = None  # since when nothing is in flight
        self._idle = 0.0
        self._changed = asyncio.Condition()

    async def admit(self) -> int:
        """Consumes the slots of one group; returns its ticket. Waits for slots and memory: woken by `release`, `take`
        and voids."""
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            self._free -= self._group_size
            self._next_ticket += 1
            size = self._group_size
            self._groups[self._next_ticket] = Group(self._clock(), [None] * size, [0.0] * size)
            self._count_in_flight(size)
            return self._next_ticket

    async def put(self, ticket: int, outcome: ExperienceRef | Void, member: int = 0) -> None:
        """Stores the outcome of one rollout of this ticket's group. Wakes `take`, and `admit` if it is a void."""
        async with self._changed:
            group = self._groups[ticket]
            group.outcomes[member], group.finished[member] = outcome, self._clock()
            if isinstance(outcome, Void):
                self._num_void += 1
                self._last_reason = outcome.reason
            else:
                self._bytes += outcome.num_bytes
                self._num_scored += 1
            if len(group.voids) == self._group_size:
                self._drop(ticket, group.voids)
            self._count_in_flight(-1)
            self._changed.notify_all()

    async def take(self, count: int, policy_version: int) -> Batch:
        """Removes and returns the oldest `count` rollouts, with all new voids. Voids among them are not replaced.

        Waits until the oldest groups are complete, even if younger ones are: woken by `put`. Then fetches the tokens.
        If tokens are lost, or more than `max_staleness` versions older than `policy_version`, the rollout is asked
        again, and another group replaces its group. Raises UserError if too many are void for other reasons.
        """
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._oldest_complete(count) or self._too_many_voids(count))
                if self._too_many_voids(count):
                    raise UserError(
                        f"{self._num_void} of {self._num_void + max(count, self._num_scored)} rollouts are void, more "
                        f"than reward.max_void_share ({self._max_void_share:.0%}) allows; the last reason: "
                        f"{self._last_reason}; fix it and continue with --resume, or raise reward.max_void_share"
                    )
                oldest = dict(islice(self._groups.items(), count // self._group_size))
            rows = [row for group in oldest.values() for row in group.rows]
            too_old = f"its oldest token is more than {self._max_staleness} versions old"
            faults = {row.ref.sample_id: too_old for row in rows if row.staleness(policy_version) > self._max_staleness}
            fetched: Sequence[Experience | RolloutLostError] = []
            if not faults:
                fetched = await self._fetch(rows)
                lost = (pair for pair in zip(rows, fetched, strict=True) if isinstance(pair[1], RolloutLostError))
                faults = {row.ref.sample_id: str(error) for row, error in lost}
            async with self._changed:
                self._changed.notify_all()  # there is more room
                if not faults:
                    return self._batch_of(oldest, [row for row in fetched if isinstance(row, Experience)])
                for ticket, group in oldest.items():
                    if any(row.ref.sample_id in faults for row in group.rows):
                        self._ask_again(ticket, faults)

    async def release(self, count: int) -> None:
        """Frees the slots of a batch. The loop calls it after publication, so that no rollout is born stale."""
        async with self._changed:
            self._free += count
            self._changed.notify_all()

    def num_finished(self, count: int) -> int:
        """How many of the `count` oldest rollouts are generated and scored."""
        oldest = islice(self._groups.values(), count // self._group_size)
        return sum(outcome is not None for group in oldest for outcome in group.outcomes)

    def _has_room(self) -> bool:
        admitted = len(self._groups) * self._group_size
        if self._free < self._group_size or admitted >= self._wanted:
            return False
        # The next batch is always admitted, however large it is: otherwise the loop would wait for it forever.
        taken = self._bytes + (self._in_flight + self._group_size) * self._rollout_bytes
        return admitted < self._batch_size or taken <= self._max_bytes

    def _oldest_complete(self, count: int) -> bool:
        num_groups = count // self._group_size
        if len(self._groups) < num_groups:
            return False
        if (blocking := self._groups.get(self._blocking or 0)) is not None and not blocking.complete:
            return False
        oldest = islice(self._groups.items(), num_groups)
        self._blocking = next((ticket for ticket, group in oldest if not group.complete), None)
        return self._blocking is None

    def _too_many_voids(self, count: int) -> bool:
        return self._num_void > self._max_void_share * (self._num_void + max(count, self._num_scored))

    def _ask_again(self, ticket: int, faults: dict[SampleId, str]) -> None:
        """Drops a group whose rollouts are all asked again, under their ids."""
        voids = []
        for outcome in self._groups[ticket].outcomes:
            if isinstance(outcome, Void):
                voids.append(replace(outcome, asked_again=True))
            elif outcome is not None:
                self._bytes -= outcome.num_bytes
                sample_id = outcome.ref.sample_id
                reason = faults.get(sample_id, "another response to its prompt must be generated again")
                voids.append(Void(sample_id, reason, asked_again=True))
        self._drop(ticket, voids)

    def _drop(self, ticket: int, voids: list[Void]) -> None:
        del self._groups[ticket]
        self._voids += voids
        self._free += self._group_size

    def _batch_of(self, oldest: dict[int, Group], rows: list[Experience]) -> Batch:
        """The batch of these groups, which leave the buffer. `rows`: their rollouts, as fetched."""
        for ticket, group in oldest.items():
            del self._groups[ticket]
            self._wanted -= self._group_size
            self._bytes -= sum(row.num_bytes for row in group.rows)
            self._voids += group.voids
        now = self._clock()
        times = [
            (finished - group.admitted, now - finished)
            for group in oldest.values()
            for finished, outcome in zip(group.finished, group.outcomes)
            if isinstance(outcome, ExperienceRef)
        ]
        idle = self._idle + (now - self._idle_since if self._idle_since is not None else 0.0)
        stats = {
            "staleness/generating_s": sum(generating for generating, _ in times) / len(times),
            "staleness/buffered_s": sum(buffered for _, buffered in times) / len(times),
            "wait/generators_s": idle,
        }
        if self._idle_since is not None:
            self._idle_since = now
        self._idle = 0.0
        voids, self._voids = self._voids, []
        self._num_scored = self._num_void = 0
        return Batch(rows, voids, stats)

    def _count_in_flight(self, change: int) -> None:
        """Counts rollouts in flight, and the time in which there were none."""
        self._in_flight += change
        if self._in_flight == 0:
            self._idle_since = self._clock()
        elif self._idle_since is not None:
            self._idle += self._clock() - self._idle_since
            self._idle_since = None
