"""Bounded slots between admission and consumption: what is in flight, and which rollouts make the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice

from common.config import UserError
from common.types import Experience, Void


class RolloutBuffer:
    """At most `(max_staleness + 1) * rollouts_per_step` rollouts exist between `admit` and `release`.

    Batches are cut in admission order, so short responses are not favoured. With max_staleness 0 that is synchronous
    PPO: a batch's slots are freed only when the generators hold the weights that came of it.
    """

    def __init__(self, rollouts_per_step: int, max_staleness: int, *, max_void_share: float = 1.0) -> None:
        self._max_void_share = max_void_share
        self._free = (max_staleness + 1) * rollouts_per_step
        self._max_staleness = max_staleness
        self._next_ticket = 0
        self._queue: deque[int] = deque()  # admitted and neither cut nor void, in order of admission
        self._finished: dict[int, Experience] = {}
        self._voids: list[Void] = []
        self._changed = asyncio.Condition()

    async def admit(self) -> int:
        """A ticket, once a slot is free. Woken by `release` and by voids."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free > 0)
            self._free -= 1
            self._next_ticket += 1
            self._queue.append(self._next_ticket)
            return self._next_ticket

    async def put(self, ticket: int, outcome: Experience | Void) -> None:
        """How the rollout of this ticket ended. A void gives its slot back at once."""
        async with self._changed:
            if isinstance(outcome, Void):
                self._void(ticket, outcome)
            else:
                self._finished[ticket] = outcome
            self._changed.notify_all()

    async def take(self, count: int, policy_version: int) -> tuple[list[Experience], list[Void]]:
        """The first `count` rollouts in admission order, and every void since the last call.

        Waits for the oldest ones to finish, however many younger ones already have. A rollout whose oldest token is
        more than max_staleness versions behind `policy_version` is voided here, whatever let it through before.
        Raises UserError when voids pass the configured share: a broken reward would otherwise go on for ever.
        """
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._oldest_finished(count) or self._too_many_voids(count))
                if self._too_many_voids(count):
                    raise UserError(
                        f"{len(self._voids)} rollouts were voided for the {count} that this step needs, over the share "
                        f"in reward.max_void_share ({self._max_void_share:.0%}); the last reason: "
                        f"{self._voids[-1].reason}; mend it and go on with --resume, or raise the share"
                    )
                stale = [ticket for ticket in list(self._queue)[:count] if self._is_stale(ticket, policy_version)]
                if not stale:
                    break
                for ticket in stale:
                    sample_id = self._finished.pop(ticket).rollout.prompt.sample_id
                    self._void(ticket, Void(sample_id, f"older than {self._max_staleness} versions"))
                self._changed.notify_all()
            batch = [self._finished.pop(self._queue.popleft()) for _ in range(count)]
            voids, self._voids = self._voids, []
            return batch, voids

    async def release(self, count: int) -> None:
        """Frees the slots of a batch. Called after publication, so that no rollout is born stale."""
        async with self._changed:
            self._free += count
            self._changed.notify_all()

    def _oldest_finished(self, count: int) -> bool:
        return len(self._queue) >= count and all(ticket in self._finished for ticket in islice(self._queue, count))

    def _too_many_voids(self, count: int) -> bool:
        return len(self._voids) > self._max_void_share * (len(self._voids) + count)

    def _void(self, ticket: int, void: Void) -> None:
        self._queue.remove(ticket)
        self._voids.append(void)
        self._free += 1

    def _is_stale(self, ticket: int, policy_version: int) -> bool:
        oldest = int(self._finished[ticket].rollout.policy_versions.min(initial=policy_version))
        return policy_version - oldest > self._max_staleness
