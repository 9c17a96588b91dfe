"""The `Learner`s of all ranks behind one object, and the ranks of the other trainers. Runs in the driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray

from common.config.ppo import Config
from common.daemon_threads import answer, in_daemon_thread
from common.errors import RankLostError
from common.types import Manifest, PublishedBucket
from learner.ppo.critic_files import TrainedCritic
from learner.ranks.rank_group import RankGroup
from learner.reward_model.pairs import Pair

T = TypeVar("T")


class LearnerGroup(RankGroup):
    """`learner.loop.roles.LearnerGroup` over the actors of the ranks."""

    def __init__(self, *args: Any, deltas: bool = False, **kwargs: Any) -> None:
        """With `deltas`, a publication also has each bucket's delta against the previous set, which is kept for this
        purpose."""
        super().__init__(*args, **kwargs)
        self._deltas = deltas
        self._base: Sequence[Any] = ()  # references to the Buckets of the last set that was published completely
        self._complete = asyncio.Event()  # cleared while the group starts again

    async def start(self) -> None:
        await super().start()
        self._complete.set()

    async def rebuild(self) -> None:
        self._complete.clear()
        await self._processes.kill()  # a call that has its turn now fails, and ends its turn
        async with self._turn:
            self._forget_rendezvous()
            self._step, self._base = 0, ()  # without a base, the next publication is complete
            await self.start()

    async def unless_lost(self, work: Awaitable[T]) -> T:
        return await self._processes.unless_lost(work)

    async def credit(self) -> pa.Table:
        tables = await self._call("return the values of tokens", lambda rank: rank.credit.remote())
        return tables[0]

    async def skip(self) -> None:
        [self._step, *_] = await self._call("skip a step", lambda rank: rank.skip.remote())

    async def reconfigure(self, cfg: Config) -> None:
        await self._call("take new settings", lambda rank: rank.reconfigure.remote(cfg))

    async def until_rebuilt(self) -> None:
        """Waits until the ranks can be called: after a loss, until `rebuild` has started them again."""
        try:
            self._processes.check()
        except RankLostError:
            self._complete.clear()
        await self._complete.wait()

    async def publish(self) -> AsyncGenerator[PublishedBucket | Manifest, None]:
        """The newest weights, bucket by bucket while rank 0 packs more, and last their manifest. Every rank takes part,
        because sharded tensors must be gathered from all of them."""
        async with self._turn, aclosing(self._publish()) as publication:
            async for item in publication:
                yield item

    async def _publish(self) -> AsyncGenerator[PublishedBucket | Manifest, None]:
        self._processes.check()
        base: Sequence[Any] = self._base
        published: list[Any] = []
        calls = [rank.publish.options(num_returns="streaming").remote for rank in self._processes.handles]
        items = self._read("publish weights", [call(*base) if call is calls[0] else call() for call in calls])
        with self._processes.during(f"publish weights at step {self._step}"):
            async for item in items:
                if isinstance(item, Manifest):
                    self._base = published if self._deltas else ()
                    yield item
                else:
                    published.append(item)
                    yield PublishedBucket(item, best=await anext(items) if base else item)

    async def _read(self, what: str, streams: list[ray.ObjectRefGenerator]) -> AsyncGenerator[Any, None]:
        """Yields the references that rank 0 streams, without reading them. Instead of the last reference it yields its
        value.

        Ray puts the error of a rank into its stream, in place of the last item. So the last item of every rank is read
        and all others are not. An item is passed on when the next one has come and shows that it was not the last.
        """
        running, newest = dict(enumerate(streams)), dict[int, Any]()
        while running:
            # Ray's own asynchronous iteration of a stream would fetch every item, so a thread waits.
            wait = partial(ray.wait, list(running.values()), timeout=self._timeout_s, fetch_local=False)
            ready, _ = await self._processes.unless_lost(answer(in_daemon_thread(wait)))
            if not ready:
                raise self._timed_out(what, self._timeout_s, list(running))
            rank = streams.index(ready[0])
            item = next(ready[0], None)
            if item is None:
                del running[rank]
                if await _failed(newest[rank]):
                    ends = {other: _last(stream, newest.get(other)) for other, stream in running.items()}
                    await self._wait(what, {rank: newest[rank], **ends})
            else:
                if rank == 0 and rank in newest:
                    yield newest[rank]
                newest[rank] = item
        [manifest] = await self._wait(what, {0: newest[0]})
        yield manifest

    async def save_policy(self, directory: Path) -> None:
        await self._call("save the policy", lambda rank: rank.save_policy.remote(directory.resolve()))

    async def policy_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        answers = await self._call("measure rollouts", lambda rank: rank.policy_logprobs.remote(*rollouts))
        return answers[0]

    async def ref_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        """Log-probabilities of each response with the LoRA adapters off, float32 [R], nats. `rollouts` may be
        references."""
        answers = await self._call("measure rollouts", lambda rank: rank.ref_logprobs.remote(*rollouts))
        return answers[0]


class RewardTrainerGroup(RankGroup):
    """`learner.reward_model.training.Trainers` over the actors of the ranks."""

    role = "RewardTrainer"

    async def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [N, 2]; the ranks share the pairs."""
        shared = await self._share(list(pairs))
        scores = await self._call("score pairs", lambda rank: rank.scores.remote(shared))
        return scores[0]

    async def save_model(self, directory: Path) -> None:
        await self._call("save the reward model", lambda rank: rank.save_model.remote(directory.resolve()))


class CriticTrainerGroup(RankGroup):
    """`learner.critic.training.Trainers` over the actors of the ranks."""

    role = "CriticTrainer"

    async def remember(self, table: pa.Table) -> None:
        shared = await self._share(table)
        await self._call("compute states", lambda rank: rank.remember.remote(shared))

    async def values(self, table: pa.Table) -> np.ndarray:
        """float32 [B, R]; the ranks share the rollouts."""
        shared = await self._share(table)
        values = await self._call("value responses", lambda rank: rank.values.remote(shared))
        return values[0]

    async def save_critic(self, target: Path, record: TrainedCritic) -> None:
        await self._call("save the critic", lambda rank: rank.save_critic.remote(target.resolve(), record))


async def _failed(item: Any) -> bool:
    """True if a streamed item is an error."""
    try:
        await item
    except Exception:  # a rank may raise any error
        return True
    return False


async def _last(stream: Any, newest: Any) -> Any:
    """The value of a stream's last item; `newest` is the last one that was taken from it."""

    def last() -> Any:
        item = newest
        while (following := next(stream, None)) is not None:
            item = following
        return item

    return await (await answer(in_daemon_thread(last)))
