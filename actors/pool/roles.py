"""The roles of the loop (`learner.loop.roles`) over pools of replicas. Runs in the driver.

Those protocols document the methods. Tokens stay in the process that sampled them: only references and a few numbers
pass through here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from actors.pool.host import Host
from actors.pool.loading import WeightLoader
from actors.pool.membership import OnEvent
from actors.pool.pool import Pool, Preferred
from common.config.base import Replicated
from common.errors import RolloutLostError
from common.types import Manifest, Prompt, PublishedBucket, RolloutRef, Score, Void


class GeneratorPool:
    """`learner.loop.roles.Generators`. A replica gets prompts only while it holds the newest weights."""

    def __init__(
        self, host: Host, cfg: Replicated, *, on_event: OnEvent = lambda event: None, response_tokens: int = 0
    ) -> None:
        """`response_tokens`: the longest response. A prompt adds its own length plus this to a replica's load."""
        self.pool = Pool(
            host,
            cfg,
            on_event=on_event,
            catch_up=lambda replica: self.weights.catch_up(replica),
            hand_over=lambda handle: handle.hand_over.remote(),
        )
        self.weights = WeightLoader(self.pool)
        self._response_tokens = response_tokens

    async def generate(
        self, prompt: Prompt, *, plain_tokens: int = 0, begun: Any = None, near: Preferred | None = None
    ) -> RolloutRef:
        """If its replica dies, another one starts again. If it leaves, another one continues the partial response.

        `begun`: a reference to the Rollout to continue. Raises RolloutLostError if that is lost. `near`: the replica
        that has its tokens in its cache.
        """
        cost = len(prompt.token_ids) + self._response_tokens
        start = begun
        while True:
            ask = partial(_generate, prompt, begun, plain_tokens)
            try:
                rollout, ref = await self.pool.call(f"answer prompt {prompt.sample_id}", ask, cost=cost, prefer=near)
            except RolloutLostError:  # the node that held the partial response is gone
                if start is not None and begun is start:
                    raise
                begun = start
                continue
            if ref.finished:
                return replace(ref, rollout=rollout)
            begun = rollout

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return await self.pool.host.fetch(references)

    async def sleep(self) -> None:
        """Until `wake` no replica starts: it would take memory that the learner uses."""
        await self.pool.members.hold_starts()
        await self.pool.each(lambda replica: self.pool.ask(replica, "sleep", lambda handle: handle.sleep.remote()))
        self.pool.limits.stop()

    async def wake(self) -> None:
        self.pool.limits.start()
        await self.pool.each(lambda replica: self.pool.ask(replica, "wake", lambda handle: handle.wake.remote()))
        self.pool.members.allow_starts()

    async def load(self, weights: AsyncGenerator[PublishedBucket | Manifest, None], version: int) -> dict[str, float]:
        return await self.weights.load(weights, version)


async def _generate(prompt: Prompt, begun: Any, plain_tokens: int, handle: Any) -> tuple[Any, RolloutRef]:
    """A reference to the rollout, and the facts about it that the loop needs."""
    rollout, ref = handle.generate.options(num_returns=2).remote(prompt, begun, plain_tokens)
    return rollout, await ref


async def _logprobs(rollout: Any, handle: Any) -> tuple[Any, bool]:
    """A reference to the log-probabilities, and True if all are finite."""
    logprobs, finite = handle.logprobs.options(num_returns=2).remote(rollout)
    return logprobs, await finite


class RewardPool:
    """`learner.loop.roles.Reward`."""

    def __init__(self, pool: Pool, keep: Callable[[Void], Void] = lambda void: void) -> None:
        """`keep` writes the ScoringError of a void to a file, and returns the void without it."""
        self._pool = pool
        self._keep = keep

    async def score(self, ref: RolloutRef) -> Score | Void:
        return await self._ask(ref, "score", lambda handle: handle.score.remote(ref.rollout))

    async def judge(self, ref: RolloutRef) -> Score | Void:
        return await self._ask(ref, "judge", lambda handle: handle.judge.remote(ref.rollout))

    async def _ask(self, ref: RolloutRef, what: str, call: Callable[[Any], Any]) -> Score | Void:
        result = await self._pool.call(f"{what} rollout {ref.sample_id}", call, cost=ref.num_tokens)
        if isinstance(result, Void):
            return self._keep(result)
        return replace(result, judge_voids={name: self._keep(void) for name, void in result.judge_voids.items()})


class ReferencePool:
    """`learner.loop.roles.Reference`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def logprobs(self, ref: RolloutRef) -> tuple[Any, bool]:
        what = f"compute the log-probabilities of rollout {ref.sample_id}"
        return await self._pool.call(what, partial(_logprobs, ref.rollout), cost=ref.num_tokens)
