"""Groups of ranks: one `Learner` or `RewardTrainer` per device, as Ray actors behind one object. Runs in the driver.

(Only `_rendezvous` is sent to the first rank, and runs there.)
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from torch.distributed import DistError

from common.config.ppo import Config
from common.errors import BatchError, RoleError, RolloutLostError, UserError, death_reason
from common.model.batcher import Batcher
from common.types import Manifest, PublishedBucket, RolloutRef
from learner.reward_model.pairs import Pair

T = TypeVar("T")

# After one rank has failed, the time in which the others may still report their own errors, seconds.
_AFTERMATH_S = 10.0


class RankGroup:
    """The calls that every kind of group has. All ranks take part in each, because they gather and reduce together.

    Only one call runs at once. The others wait here: in the ranks' own queues, their time limit would already run.
    """

    role = "Learner"  # the name of each rank in messages

    def __init__(self, ranks: list[Any], *, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._step = 0
        self._rendezvous = ""  # address where several ranks meet

    @property
    def step(self) -> int:
        return self._step

    async def start(self, timeout_s: float) -> None:
        """Waits until every rank has loaded its networks and met the others."""
        world = len(self._ranks)
        if world > 1:
            [self._rendezvous] = await self._wait(
                "start", [self._ranks[0].__ray_call__.remote(_rendezvous)], timeout_s=timeout_s
            )
        joined = [rank.join.remote(index, world, self._rendezvous) for index, rank in enumerate(self._ranks)]
        await self._wait("start", joined, timeout_s=timeout_s)

    def stop(self) -> None:
        """Kills every rank, which frees its resources."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._rendezvous.startswith("file://"):
            shutil.rmtree(Path(self._rendezvous.removeprefix("file://")).parent, ignore_errors=True)

    async def update(self, batch: Any) -> dict[str, float]:
        shared = ray.put(batch)  # one copy for all ranks
        async with self._turn:
            stats = await self._wait("update", [rank.update.remote(shared) for rank in self._ranks])
            self._step += 1
        return stats[0]

    async def save(self, directory: Path) -> dict[str, str]:
        async with self._turn:
            calls = [rank.save.remote(directory.resolve()) for rank in self._ranks]
            files = await self._wait("save a checkpoint", calls)
        return {name: digest for part in files for name, digest in part.items()}

    async def restore(self, directory: Path) -> None:
        async with self._turn:
            calls = [rank.restore.remote(directory.resolve()) for rank in self._ranks]
            [self._step, *_] = await self._wait("restore a checkpoint", calls)

    async def _wait(
        self, what: str, calls: Sequence[Any], *, ranks: Sequence[int] | None = None, timeout_s: float | None = None
    ) -> list[Any]:
        """The answers of all `calls`, one to each of `ranks` (default: all in order).

        When one rank fails, ranks that wait for it lose their connection and may report that first. Of several errors
        the original one is raised.
        """
        limit = timeout_s or self._timeout_s
        tasks = dict(zip(ranks or range(len(calls)), map(asyncio.ensure_future, calls), strict=True))
        done, _ = await asyncio.wait(tasks.values(), timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() for task in done):
            done, _ = await asyncio.wait(tasks.values(), timeout=min(limit, _AFTERMATH_S))
        errors = {rank: error for rank, task in tasks.items() if task in done and (error := task.exception())}
        if errors:
            raise self._role_error(what, *min(errors.items(), key=lambda item: _is_consequence(item[1])))
        if len(done) < len(tasks):
            raise self._timeout_error(what, limit, [rank for rank, task in tasks.items() if task not in done])
        return [task.result() for task in tasks.values()]

    def _role_error(self, what: str, rank: int, error: BaseException) -> BaseException:
        """The error to raise when a rank failed: it names the rank, unless the user has to fix something."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, (UserError, BatchError)):
            return error.cause  # without the trace of another process
        if isinstance(error, RayActorError):
            reason = death_reason(error)
            died = RoleError(f"{self.role}({rank}) died while it was to {what} at step {self._step}: {reason}")
            died.__cause__ = error
            return died
        if len(self._ranks) > 1:
            error.add_note(f"rank {rank} of {len(self._ranks)} did not {what} at step {self._step}")
        return error

    def _timeout_error(self, what: str, limit: float, ranks: Sequence[int]) -> RoleError:
        names = ", ".join(f"{self.role}({rank})" for rank in ranks)
        setting = "ray.startup_timeout_s" if what == "start" else "learner.timeout_s"
        return RoleError(
            f"{names} did not {what} at step {self._step} within {limit:g} s ({setting}); find out what blocks it, or "
            "raise the limit, and continue with --resume"
        )


class LearnerGroup(RankGroup):
    """`learner.loop.roles.LearnerGroup` over the actors of the ranks."""

    def __init__(self, ranks: list[Any], *, timeout_s: float, deltas: bool = False) -> None:
        """With `deltas` a publication has each bucket's delta against the previous set, which is kept for that."""
        super().__init__(ranks, timeout_s=timeout_s)
        self._deltas = deltas
        self._base: Sequence[Any] = ()  # references to the Buckets of the last set that was published completely

    async def publish(self) -> AsyncGenerator[PublishedBucket | Manifest, None]:
        """The newest weights, bucket by bucket while rank 0 packs more, and last their manifest. Every rank takes part,
        because sharded tensors must be gathered from all of them."""
        async with self._turn, aclosing(self._publish()) as publication:
            async for item in publication:
                yield item

    async def _publish(self) -> AsyncGenerator[PublishedBucket | Manifest, None]:
        base: Sequence[Any] = self._base
        published: list[Any] = []
        calls = [rank.publish.options(num_returns="streaming").remote for rank in self._ranks]
        items = self._read("publish weights", [call(*base) if call is calls[0] else call() for call in calls])
        async for item in items:
            if isinstance(item, Manifest):
                self._base = published if self._deltas else ()
                yield item
            else:
                published.append(item)
                yield PublishedBucket(item, best=await anext(items) if base else item)

    async def _read(self, what: str, streams: list[ray.ObjectRefGenerator]) -> AsyncGenerator[Any, None]:
        """Yields the references that rank 0 streams, without reading them, and instead of the last one its value.

        Ray puts the error of a rank into its stream, in place of the last item. So the last item of every rank is read
        and all others are not. An item is passed on when the next one has come and shows that it was not the last.
        """
        running, newest, manifest = dict(enumerate(streams)), dict[int, Any](), None
        while running:
            # Ray's own asynchronous iteration of a stream would fetch every item, so a thread waits.
            wait = partial(ray.wait, list(running.values()), timeout=self._timeout_s, fetch_local=False)
            ready, _ = await asyncio.to_thread(wait)
            if not ready:
                raise self._timeout_error(what, self._timeout_s, list(running))
            rank = streams.index(ready[0])
            item = next(ready[0], None)
            if item is None:
                del running[rank]
                [last] = await self._wait(what, [newest[rank]], ranks=[rank])
                manifest = last if rank == 0 else manifest
            else:
                if rank == 0 and rank in newest:
                    yield newest[rank]
                newest[rank] = item
        yield manifest

    async def save_policy(self, directory: Path) -> None:
        async with self._turn:
            await self._wait("save the policy", [rank.save_policy.remote(directory.resolve()) for rank in self._ranks])

    async def policy_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        async with self._turn:
            calls = [rank.policy_logprobs.remote(*rollouts) for rank in self._ranks]
            answers = await self._wait("measure rollouts", calls)
        return answers[0]

    async def ref_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        """Log-probabilities of each response with the LoRA adapters off, float32 [R], nats. `rollouts` may be
        references."""
        async with self._turn:
            calls = [rank.ref_logprobs.remote(*rollouts) for rank in self._ranks]
            answers = await self._wait("measure rollouts", calls)
        return answers[0]

    async def skip(self) -> None:
        async with self._turn:
            [self._step, *_] = await self._wait("skip a step", [rank.skip.remote() for rank in self._ranks])

    async def reconfigure(self, cfg: Config) -> None:
        async with self._turn:
            await self._wait("take new settings", [rank.reconfigure.remote(cfg) for rank in self._ranks])

    async def rebuild(self) -> None:
        raise NotImplementedError

    async def unless_lost(self, work: Awaitable[T]) -> T:
        return await work


class AdapterReference:
    """`learner.loop.roles.Reference` of a policy with LoRA adapters: the learner's own ranks with the adapters off.

    It takes turns with the learner's other calls: rollouts that arrive during an update are measured after it.
    """

    def __init__(self, learner: LearnerGroup) -> None:
        self._batcher: Batcher[RolloutRef, np.ndarray] = Batcher(
            lambda batch: learner.ref_logprobs([ref.rollout for ref in batch]),
            num_tokens=lambda ref: ref.num_tokens,
            max_tokens=1 << 16,
            window_s=0.05,
        )

    async def logprobs(self, ref: RolloutRef) -> tuple[np.ndarray, bool]:
        """Float32 [R], nats, and whether all are finite. Raises RolloutLostError if any rollout of the same pass is
        lost."""
        try:
            logprobs = await self._batcher.submit(ref)
        except ObjectLostError as error:
            raise RolloutLostError("its tokens were lost with the node that held them") from error
        return logprobs, bool(np.isfinite(logprobs).all())


class RewardTrainerGroup(RankGroup):
    """`learner.reward_model.training.Trainers` over the actors of the ranks."""

    role = "RewardTrainer"

    async def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [N, 2]; the ranks share the pairs."""
        shared = ray.put(list(pairs))
        async with self._turn:
            scores = await self._wait("score pairs", [rank.scores.remote(shared) for rank in self._ranks])
        return scores[0]

    async def save_model(self, directory: Path) -> None:
        async with self._turn:
            calls = [rank.save_model.remote(directory.resolve()) for rank in self._ranks]
            await self._wait("save the reward model", calls)


def _is_consequence(error: BaseException) -> bool:
    """True for the error of a rank that only lost its connection to another one."""
    if not isinstance(error, RayTaskError):
        return False  # the process itself is gone
    text = str(error.cause)
    return isinstance(error.cause, DistError) or any(sign in text for sign in ("gloo", "Connection", "NCCL"))


def _rendezvous(first: Any) -> str:
    """Called in the first rank's process: the address where the ranks meet. On a cluster of this machine alone that is
    a file, so that nothing listens on a port; otherwise a free port of this rank's node."""
    host = ray.util.get_node_ip_address()
    if host.startswith("127."):
        return f"file://{tempfile.mkdtemp(prefix='ratchet-')}/rendezvous"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"
