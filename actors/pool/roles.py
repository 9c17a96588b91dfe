"""The roles of the loop (`learner.loop.roles`) over pools of replicas. Runs in the driver.

Those protocols document the methods. Tokens stay in the process that sampled them: only references and a few numbers
pass through here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from actors.pool.host import Host
from actors.pool.membership import OnEvent
from actors.pool.pool import Pool
from actors.pool.replica import Replica
from common.config.base import Replicated
from common.errors import CorruptWeightsError, RoleError, RolloutLostError
from common.types import Manifest, Prompt, PublishedBucket, RolloutRef, Score, Void


class GeneratorPool:
    """`learner.loop.roles.Generators`. A replica gets prompts only while it holds the newest weights."""

    def __init__(
        self, host: Host, cfg: Replicated, *, on_event: OnEvent = lambda event: None, response_tokens: int = 0
    ) -> None:
        """`response_tokens`: the longest response. A prompt's share of a replica's load is its own length plus this."""
        self.pool = Pool(
            host, cfg, on_event=on_event, catch_up=self._catch_up, hand_over=lambda handle: handle.hand_over.remote()
        )
        self._response_tokens = response_tokens
        self._version: int | None = None  # the learner's newest version; None: nothing was loaded yet
        self._buckets: list[Any] = []  # references to that version's Buckets, for replicas that join later

    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        """If its replica dies, another one starts again. If it leaves, another one continues the partial response."""
        cost = len(prompt.token_ids) + self._response_tokens
        begun: Any = None
        while True:
            ask = partial(_generate, prompt, begun, plain_tokens)
            try:
                rollout, ref = await self.pool.call(f"answer prompt {prompt.sample_id}", ask, cost=cost)
            except RolloutLostError:  # the node that held the partial response is gone
                begun = None
                continue
            if ref.finished:
                return replace(ref, rollout=rollout)
            begun = rollout

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return await self.pool.host.fetch(references)

    async def load(self, weights: AsyncGenerator[PublishedBucket | Manifest, None], version: int) -> dict[str, float]:
        """Every replica fetches and stages each bucket while the learner packs the next ones. Then all replicas swap.
        Returns the metrics `weights/bytes` and `weights/pause_s`."""
        full: list[Any] = []  # references to all Buckets so far
        sent: dict[int, _Sent] = {}  # by the replica's number

        async def stage(replica: Replica, best: Sequence[Any] = ()) -> None:
            """Sends the newest buckets in their best form, or in full all buckets that the replica lacks."""
            done = sent.get(replica.number)
            if done is None:  # a replica can use deltas if it holds the previous version and gets all of them
                usable = replica.version == self._version and len(full) == len(best)
                done = sent[replica.number] = _Sent(deltas=usable)
            if done.deltas:
                done.num_best += len(best)
                try:
                    await self._stage(replica, version, best)
                    return
                except CorruptWeightsError:
                    done.deltas = False
            await self._stage(replica, version, full[done.num_full :])
            done.num_full = len(full)

        async def swap(replica: Replica) -> float:
            self.pool.members.suspend(replica, "new weights")
            await stage(replica)  # sends all buckets to a replica that joined after the last one
            pause_s = await self._swap(replica, version)
            self.pool.members.resume(replica, "new weights")
            return pause_s

        manifest = Manifest((), ())
        async with aclosing(weights):
            async for item in weights:
                if isinstance(item, Manifest):
                    manifest = item
                else:
                    full.append(item.full)
                    await self.pool.each(partial(stage, best=[item.best]))
                del item  # so that the object store can free the delta
        # From here on, replicas that join take this version.
        self._buckets, self._version = full, version
        pauses = await self.pool.each(swap)
        return {
            "weights/bytes": sum(done.num_bytes(manifest) for done in sent.values()),
            "weights/pause_s": max(pauses.values(), default=0.0),
        }

    async def _catch_up(self, replica: Replica) -> None:
        """Gives a new replica the newest weights; again if newer ones came meanwhile."""
        while (version := self._version) is not None and version != replica.version:
            await self._stage(replica, version, self._buckets)
            await self._swap(replica, version)

    async def _stage(self, replica: Replica, version: int, parts: Sequence[Any]) -> None:
        if parts:
            what = f"stage weights version {version}"
            await self.pool.ask(replica, what, lambda handle: handle.stage.remote(*parts))

    async def _swap(self, replica: Replica, version: int) -> float:
        """Returns how long the engine did not step, seconds."""
        what = f"swap in weights version {version}"
        held, pause_s = await self.pool.ask(replica, what, lambda handle: handle.swap.remote(version))
        if held != version:
            raise RoleError(f"{replica.name} was to load weights version {version}, but it holds version {held}")
        replica.version = held
        return pause_s


@dataclass
class _Sent:
    """The new buckets that one replica got: the first `num_best` in best form, the first `num_full` in full."""

    deltas: bool  # it is sent the best form; after it refuses one, it is sent the whole set in full
    num_best: int = 0
    num_full: int = 0

    def num_bytes(self, manifest: Manifest) -> int:
        return sum(manifest.best_bytes[: self.num_best]) + sum(manifest.full_bytes[: self.num_full])


async def _generate(prompt: Prompt, begun: Any, plain_tokens: int, handle: Any) -> tuple[Any, RolloutRef]:
    """A reference to the rollout, and the facts about it that the loop needs."""
    rollout, ref = handle.generate.options(num_returns=2).remote(prompt, begun, plain_tokens)
    return rollout, await ref


async def _measure(rollout: Any, handle: Any) -> tuple[Any, bool]:
    """A reference to the log-probabilities, and whether all are finite."""
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
        result = await self._pool.call(f"{what} {ref.sample_id}", call, cost=ref.num_tokens)
        return self._keep(result) if isinstance(result, Void) else result


class ReferencePool:
    """`learner.loop.roles.Reference`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def logprobs(self, ref: RolloutRef) -> tuple[Any, bool]:
        return await self._pool.call(f"measure {ref.sample_id}", partial(_measure, ref.rollout), cost=ref.num_tokens)
