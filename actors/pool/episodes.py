"""Generators whose rollouts are episodes: the policy and an environment write in turns. Runs in the driver.

Tokens stay in the processes of generators and environments: only references and a few numbers pass through here.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from actors.pool.pool import Pool, Preferred
from actors.pool.roles import GeneratorPool
from common.errors import GivenUpError
from common.metrics import meters
from common.types import Manifest, Prompt, PublishedBucket, RolloutRef, Void

T = TypeVar("T")


@dataclass
class Episode:
    """An episode between two turns: what another environment replica needs to continue it."""

    prompt: Prompt
    rollout: Any = None  # a reference to the Rollout; None before the first turn
    state: Any = None  # a reference to the environment's state after that turn, which is None if it has none


class Waits:
    """Counts the seconds in which environments were answering and no generator was writing."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._writing = self._answering = 0
        self._since: float | None = None  # start of the current wait; None: none
        self._seconds = 0.0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A generator writes a turn."""
        self._count(1, 0)
        try:
            yield
        finally:
            self._count(-1, 0)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """An environment answers a turn."""
        self._count(0, 1)
        try:
            yield
        finally:
            self._count(0, -1)

    def read(self) -> float:
        """The seconds since the last call."""
        self._count(0, 0)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self, writing: int, answering: int) -> None:
        now = self._clock()
        if self._since is not None:
            self._seconds += now - self._since
        self._writing, self._answering = self._writing + writing, self._answering + answering
        self._since = now if self._answering and not self._writing else None


class EpisodePool:
    """`learner.loop.roles.Generators`, over generators and environments.

    An episode stays in one environment replica from its first turn to its last. Its turns go to the generator that has
    the episode's tokens in its cache, while that generator lives and is not overloaded.
    """

    def __init__(
        self, generators: GeneratorPool, environments: Pool, *, keep: Callable[[Void], Void] = lambda void: void
    ) -> None:
        """`keep` writes the ScoringError of a void to a file, and returns the void without it."""
        self._generators, self._environments, self._keep = generators, environments, keep
        self._waits = Waits()
        self._count_death(0)

    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        """Plays a whole episode. If its environment replica dies, another one continues after the newest turn, or
        starts again if the environment has no state to restore. Raises GivenUpError with the reason if the episode is
        void."""
        if plain_tokens:
            return await self._generators.generate(prompt, plain_tokens=plain_tokens)
        episode = Episode(prompt)
        what = f"play the episode of prompt {prompt.sample_id}"
        # No limit for the whole episode: each of its calls has one.
        try:
            outcome = await self._environments.call(what, lambda handle: self._play(episode, handle), limit_s=math.inf)
        except GivenUpError as error:
            if error.role == self._environments.role:  # not generators
                self._count_death(1)
                error.kind = "died"
            raise
        if isinstance(outcome, Void):
            raise GivenUpError(self._keep(outcome).reason, kind=outcome.kind)
        return outcome

    def _count_death(self, amount: int) -> None:
        """Counts a void that no environment replica can count, because the replicas of its episode died."""
        role = self._environments.role
        meters.count("ratchet_environment_voids_total", amount, role=role, replica="", reason="died")

    async def _play(self, episode: Episode, handle: Any) -> RolloutRef | Void:
        """Plays the remaining turns on one environment replica."""
        name = f"the episode of prompt {episode.prompt.sample_id}"
        prompt, restored = await self._in_time(f"begin {name}", handle.begin.remote(episode.prompt, episode.state))
        if isinstance(prompt, Void):
            return prompt
        if not restored:
            episode.rollout = None
        near = Preferred()
        over = False
        try:
            while True:
                with self._waits.writing():
                    written = await self._generators.generate(prompt, begun=episode.rollout, near=near)
                if written.fault:
                    return written
                rollout, answer, state = handle.step.options(num_returns=3).remote(written.rollout)
                with self._waits.answering():
                    answered = await self._in_time(f"answer a turn of {name}", answer)
                over = isinstance(answered, Void) or answered.finished
                if over:
                    return answered if isinstance(answered, Void) else replace(answered, rollout=rollout)
                episode.rollout, episode.state = rollout, state
        finally:
            if not over:
                handle.end.remote(episode.prompt.sample_id)

    async def _in_time(self, what: str, answer: Awaitable[T]) -> T:
        return await self._environments.in_time(what, answer)

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return await self._generators.fetch(references)

    async def sleep(self) -> None:
        await self._generators.sleep()

    async def wake(self) -> None:
        await self._generators.wake()

    async def load(self, weights: AsyncGenerator[PublishedBucket | Manifest, None], version: int) -> dict[str, float]:
        return {**await self._generators.load(weights, version), "wait/environments_s": self.waited_s()}

    def waited_s(self) -> float:
        """Seconds since the last call in which environments were answering and no generator was writing."""
        return self._waits.read()
