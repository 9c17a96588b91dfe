"""Groups of ranks: one `Learner` or `RewardTrainer` per device as Ray actors, seen as one object."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from torch.distributed import DistError

from common.errors import RoleError, RolloutLostError, UserError
from common.model.batcher import Batcher
from common.types import RolloutRef
from common.weights import PublishedBucket
from learner.reward_model.pairs import Pair

# Once a rank has failed, how long the others may take to say what they know of it, seconds.
_AFTERMATH_S = 10.0


class RankGroup:
    """What every kind of group does. All ranks take part in every call: they gather and reduce together.

    One call is under way at a time, and the others wait for their turn here: in the ranks' own queue their time limit
    would run.
    """

    role = "Learner"  # of each rank, as it is shown

    def __init__(self, ranks: list[Any], *, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._step = 0
        self._rendezvous = ""  # where the ranks meet, if there are several

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
        """Ends every rank, and frees what it reserved."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._rendezvous.startswith("file://"):
            shutil.rmtree(Path(self._rendezvous.removeprefix("file://")).parent, ignore_errors=True)

    async def update(self, batch: Any) -> dict[str, float]:
        shared = ray.put(batch)  # once, however many ranks
        async with self._turn:
            stats = await self._wait("update", [rank.update.remote(shared) for rank in self._ranks])
            self._step += 1
        return stats[0]

    async def save(self, directory: Path) -> None:
        async with self._turn:
            await self._wait("save a checkpoint", [rank.save.remote(directory.resolve()) for rank in self._ranks])

    async def restore(self, directory: Path) -> None:
        async with self._turn:
            calls = [rank.restore.remote(directory.resolve()) for rank in self._ranks]
            [self._step, *_] = await self._wait("restore a checkpoint", calls)

    async def _wait(self, what: str, calls: list[Any], *, timeout_s: float | None = None) -> list[Any]:
        """All answers. Of several errors the one that the others follow from is raised: when a rank fails, those that
        wait for it lose their connection, and may say so first."""
        limit = timeout_s or self._timeout_s
        tasks = [asyncio.ensure_future(call) for call in calls]
        done, _ = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() for task in done):
            done, _ = await asyncio.wait(tasks, timeout=min(limit, _AFTERMATH_S))
        errors = {rank: task.exception() for rank, task in enumerate(tasks) if task in done and task.exception()}
        if errors:
            rank = min(errors, key=lambda rank: _follows(errors[rank]))
            error = errors[rank]
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                raise error.cause from None  # it is the user's to mend, without the trace of a process
            if isinstance(error, RayActorError):
                raise RoleError(
                    f"{self.role}({rank}) died as it was to {what} at step {self._step}: {_last_words(error)}"
                ) from error
            if len(self._ranks) > 1:
                error.add_note(f"rank {rank} of {len(self._ranks)} did not {what} at step {self._step}")
            raise error
        if len(done) < len(tasks):
            missing = [rank for rank, task in enumerate(tasks) if task not in done]
            raise self._late(what, limit, missing)
        return [task.result() for task in tasks]

    def _late(self, what: str, limit: float, ranks: Sequence[int] = ()) -> RoleError:
        who = ", ".join(f"{self.role}({rank})" for rank in ranks) if ranks else self.role
        setting = "ray.startup_timeout_s" if what == "start" else "learner.timeout_s"
        return RoleError(
            f"{who} did not {what} at step {self._step} within {limit:g} s ({setting}); see what keeps it, or raise "
            "the limit, and continue with --resume"
        )


class LearnerGroup(RankGroup):
    """`learner.roles.LearnerGroup` over the actors of the ranks."""

    newest: Sequence[Any] = ()  # references of the Buckets of the newest set that was published whole

    async def publish(self) -> AsyncIterator[PublishedBucket]:
        """The newest weights, as rank 0 packs them. Every rank takes part: gathering what is sharded takes all of them.
        As results of a call the buckets are owned here: they outlive the rank, and are freed once nobody holds their
        references. `newest` does until the next set is whole, so rank 0 can tell what has changed and keep nothing.

        Buckets and changes are never waited for, since that would fetch them: the note that follows them is.
        """
        async with self._turn:
            async for parcel in self._publish():
                yield parcel

    async def _publish(self) -> AsyncIterator[PublishedBucket]:
        held = [self.newest, *[()] * (len(self._ranks) - 1)]
        streams = [
            rank.publish.options(num_returns="streaming").remote(*buckets)
            for rank, buckets in zip(self._ranks, held, strict=True)
        ]
        first = streams[0]
        parts: list[Any] = []  # a bucket and its changes, while their note has not come
        published: list[Any] = []
        while streams:
            # In a thread: the stream's own asynchronous iteration would fetch the buckets too.
            waiting = asyncio.to_thread(ray.wait, streams, timeout=self._timeout_s, fetch_local=False)
            ready, _ = await waiting
            if not ready:
                raise self._late("publish weights", self._timeout_s)
            item = next(ready[0], None)
            if item is None:  # this rank is done; what comes last without a note is its error in a part's place
                streams.remove(ready[0])
                if ready[0] is first and parts:
                    await self._wait("publish weights", parts[-1:])
            elif ready[0] is first and len(parts) < 2:
                parts.append(item)
            else:  # a note, or the error of another rank
                [note] = await self._wait("publish weights", [item])
                if ready[0] is first:
                    (full, changes), (_, full_bytes, changes_bytes) = parts, note
                    parts = []
                    published.append(full)
                    yield PublishedBucket(full, None if changes_bytes is None else changes, full_bytes, changes_bytes)
        self.newest = published

    async def save_policy(self, directory: Path) -> None:
        async with self._turn:
            await self._wait("save the policy", [rank.save_policy.remote(directory.resolve()) for rank in self._ranks])

    async def policy_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        async with self._turn:
            calls = [rank.policy_logprobs.remote(*rollouts) for rank in self._ranks]
            answers = await self._wait("measure rollouts", calls)
        return answers[0]

    async def ref_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        """With LoRA: log-probabilities of each response without the adapters, float32 [R], nats. `rollouts` may be
        references."""
        async with self._turn:
            calls = [rank.ref_logprobs.remote(*rollouts) for rank in self._ranks]
            answers = await self._wait("measure rollouts", calls)
        return answers[0]


class AdapterReference:
    """`learner.roles.Reference` of a policy with LoRA adapters: the learner's own ranks, with the adapters off, between
    its other calls: what is written during an update is measured after it."""

    def __init__(self, learner: LearnerGroup) -> None:
        self._batcher: Batcher[RolloutRef, np.ndarray] = Batcher(
            lambda batch: learner.ref_logprobs([written.rollout for written in batch]),
            num_tokens=lambda written: written.num_tokens,
            max_tokens=1 << 16,
            window_s=0.05,
        )

    async def logprobs(self, written: RolloutRef) -> tuple[np.ndarray, bool]:
        """Float32 [R], nats, and whether all are finite. Raises RolloutLostError if one of those that share the pass is
        gone."""
        try:
            logprobs = await self._batcher.submit(written)
        except ObjectLostError as error:
            raise RolloutLostError("its tokens were lost with the node they lay on") from error
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


def _last_words(error: BaseException) -> str:
    """Why a process died, in one line."""
    pid = re.search(r"\bpid: (\d+)", str(error))
    if "its worker process has died" in str(error):
        return f"its process{f' {pid[1]}' if pid else ''} was killed by a signal, for want of memory, or crashed"
    return str(error).strip().splitlines()[-1]


def _follows(error: BaseException | None) -> bool:
    """Whether this is what a rank says that waited for another one, rather than what went wrong."""
    if not isinstance(error, RayTaskError):
        return False  # the process itself is gone
    text = str(error.cause)
    return isinstance(error.cause, DistError) or any(sign in text for sign in ("gloo", "Connection", "NCCL"))


def _rendezvous(first: Any) -> str:
    """Called in the first rank's process. Where ranks meet: a file on a cluster that is this machine alone, so that
    nothing listens; else a free port of that rank's node."""
    host = ray.util.get_node_ip_address()
    if host.startswith("127."):
        return f"file://{tempfile.mkdtemp(prefix='ratchet-')}/rendezvous"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"
