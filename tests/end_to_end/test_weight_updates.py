"""Weight updates on real Ray, from publishing ranks to a pool of generators, with failures on both sides."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray._private.internal_api import memory_summary

from actors.generation.engine import Completion
from actors.generation.generator import Generator
from actors.pool.pool import Pool
from actors.pool.ray_host import RayHost
from actors.pool.roles import GeneratorPool
from common.config.base import Replicated
from common.config.ppo import LearnerConfig
from common.errors import CorruptWeightsError, RankLostError, RoleError
from common.weights import buckets, publication
from learner.ranks.group import LearnerGroup

pytestmark = pytest.mark.ray

NUM_BUCKETS, VALUES = 6, 1 << 20
BUCKET_BYTES = 2 * VALUES
FULL_BYTES, CHANGES_BYTES = NUM_BUCKETS * BUCKET_BYTES, NUM_BUCKETS * VALUES // 8 * 6
PAUSE_S = 0.125


class Rank:
    """Publishes tensors of ones in which every eighth value is `version`. It can be told to fail before bucket 3."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def open_rendezvous(self, host: str) -> str:
        return ""

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        return 0

    def publish(self, *base):
        version, trouble = self._plan

        def named_tensors():
            for index in range(NUM_BUCKETS):
                if index == 3 and trouble == "error":
                    raise ValueError("cannot gather")
                if index == 3 and trouble == "death":
                    os.kill(os.getpid(), signal.SIGKILL)
                if index == 3 and trouble == "silence":
                    time.sleep(60)
                tensor = torch.ones(VALUES)
                tensor[index::8] = version
                yield f"w{index}", tensor

        if self._rank > 0:  # helps to gather, and publishes only an empty manifest
            assert not base
            list(named_tensors())
            yield from publication(())
        else:
            yield from publication(buckets(named_tensors(), version, bucket_bytes=BUCKET_BYTES), base)

    def plan(self, version: int, trouble: str = "") -> None:
        self._plan = version, trouble


class SumEngine:
    """Serves the sums of its weights. It can be told to kill its process at a bucket, or to refuse it."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.staged: dict[str, float] = {}
        self.die_at = self.refuse_at = -1

    async def stage(self, bucket) -> None:
        if bucket.index == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if bucket.index == self.refuse_at:
            raise CorruptWeightsError("told to refuse")
        if bucket.index == 0:
            self.staged = {}
        self.staged.update((name, tensor.double().sum().item()) for name, tensor in bucket.tensors())

    async def generate(self, prompt_ids, **options) -> Completion:
        return Completion(prompt_ids, np.zeros(len(prompt_ids), np.float32), np.zeros_like(prompt_ids), "length")

    async def swap(self, version: int) -> float:
        self.weights = self.staged
        return PAUSE_S


class Served(Generator):
    def __init__(self, name: str, updates: str) -> None:
        super().__init__(name, 0, SumEngine, updates=updates)

    async def weights(self) -> tuple[int, dict[str, float]]:
        return self._version, self._engine.weights

    async def die_at(self, index: int) -> None:
        self._engine.die_at = index

    async def refuse_at(self, index: int) -> None:
        self._engine.refuse_at = index

    async def forget(self) -> None:
        self._held = {}


@dataclass
class Started:
    """Ranks and a pool of generators, and the newest version that was published."""

    learner: LearnerGroup
    generators: GeneratorPool
    handles: dict[int, Any]  # of the newest ranks
    version: int = 0

    @property
    def pool(self) -> Pool:
        return self.generators.pool

    async def plan(self, *troubles: str) -> int:
        """Has the ranks prepare the next version, and returns it. A rank without trouble publishes its part."""
        self.version += 1
        told = [*troubles, *[""] * (len(self.handles) - len(troubles))]
        calls = (self.handles[rank].plan.remote(self.version, trouble) for rank, trouble in enumerate(told))
        await asyncio.gather(*calls)
        return self.version

    async def publish(self) -> tuple[int, dict[str, float]]:
        """Publishes the next version to the pool. Returns it, and the metrics."""
        version = await self.plan()
        return version, await self.generators.load(self.learner.publish(), version)

    def stop(self) -> None:
        self.pool.stop()
        self.learner.stop()


async def start(*, ranks: int = 1, replicas: int = 1, timeout_s: float = 30, updates: str = "changes") -> Started:
    handles: dict[int, Any] = {}

    def create(rank: int) -> Any:
        handles[rank] = ray.remote(num_cpus=0, concurrency_groups={"health": 1})(Rank).remote(rank)
        return handles[rank]

    learner_cfg = LearnerConfig(ranks=ranks, timeout_s=timeout_s)
    learner = LearnerGroup(create, learner_cfg, startup_timeout_s=240, deltas=True)
    cfg = Replicated(min=replicas, cpus=0)
    generators = GeneratorPool(RayHost(Served, cfg, updates), cfg)
    await asyncio.gather(learner.start(), generators.pool.start(240))
    return Started(learner, generators, handles)


def run(scenario, **settings):
    """Runs `scenario(started)` with everything started before and stopped after it."""

    async def whole():
        started = await start(**settings)
        try:
            return await scenario(started)
        finally:
            started.stop()

    return asyncio.run(asyncio.wait_for(whole(), 400))


@pytest.fixture(scope="module")
def shared(ray_cluster):
    """Two ranks and two replicas for the tests after which all of them still work, since starting them takes longest.
    Returns the function that runs a scenario."""
    with asyncio.Runner() as runner:
        started = runner.run(start(ranks=2, replicas=2, timeout_s=60))
        yield lambda scenario: runner.run(asyncio.wait_for(scenario(started), 400))
        started.stop()


async def served(pool: Pool) -> list[tuple[int, dict[str, float]]]:
    return list((await pool.each(lambda replica: replica.handle.weights.remote())).values())


def all_of(version: int) -> tuple[int, dict[str, float]]:
    return version, {f"w{index}": VALUES / 8 * (7 + version) for index in range(NUM_BUCKETS)}


def stored() -> str:
    """What this cluster's object store holds. Without the address Ray would ask any cluster of the machine."""
    return memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (3, 2)])
def test_every_replica_serves_the_published_set_and_only_one_is_stored(ray_cluster, ranks, replicas):
    async def scenario(started):
        for expected in (FULL_BYTES, CHANGES_BYTES, CHANGES_BYTES):
            version, sent = await started.publish()
            assert await served(started.pool) == [all_of(version)] * replicas
            assert sent == {"weights/bytes": replicas * expected, "weights/pause_s": PAUSE_S}
        gc.collect()  # references held by pools of earlier tests
        deadline = time.monotonic() + 60
        while f" {NUM_BUCKETS} objects" not in stored():
            assert time.monotonic() < deadline, stored()
            await asyncio.sleep(0.2)
        assert len(started.learner._base) == NUM_BUCKETS

    run(scenario, ranks=ranks, replicas=replicas)


async def refused_deltas(started, *, changes: int, full: int) -> None:
    """`changes`, `full`: the bytes of the deltas and of whole sets that two replicas are sent."""
    for _ in range(2):
        version, sent = await started.publish()
        await started.pool.ready[0].handle.forget.remote()
        assert await served(started.pool) == [all_of(version)] * 2
    # Plus the refused deltas: of at least one bucket and at most all, for each replica.
    assert changes + full < sent["weights/bytes"] <= changes + full + 2 * CHANGES_BYTES


def test_replicas_that_never_apply_deltas_are_sent_the_full_set(ray_cluster):
    run(partial(refused_deltas, changes=0, full=2 * FULL_BYTES), replicas=2, updates="full")


def test_published_buckets_outlive_the_rank(ray_cluster):
    async def scenario(started):
        version = await started.plan()
        handles = [bucket async for bucket in started.learner.publish()]
        [rank] = started.learner._processes.handles
        ray.kill(rank)
        with suppress(ray.exceptions.RayActorError):  # raised as soon as it is dead
            while True:
                await rank.plan.remote(8)

        async def stored():
            for handle in handles:
                yield handle

        await started.generators.load(stored(), version)
        return await served(started.pool)

    assert run(scenario) == [all_of(1)]


async def broken_publication(started, trouble: str, where: int, error: type[Exception], message: str) -> None:
    before, _ = await started.publish()
    version = await started.plan(*(trouble if rank == where else "" for rank in range(2)))
    with pytest.raises(error, match=message):
        await started.generators.load(started.learner.publish(), version)
    assert await served(started.pool) == [all_of(before)] * 2
    await started.learner.rebuild()
    started.version -= 1
    again, sent = await started.publish()  # the same version again, and complete
    assert again == version
    assert sent["weights/bytes"] == 2 * FULL_BYTES
    assert await served(started.pool) == [all_of(version)] * 2


def test_after_a_publication_that_takes_too_long_the_old_weights_serve(ray_cluster):
    message = "did not publish weights at step 0 within 5 s"
    late = partial(broken_publication, trouble="silence", where=0, error=RankLostError, message=message)
    run(late, ranks=2, replicas=2, timeout_s=5)


def test_a_replica_that_dies_is_replaced_by_one_with_the_newest_weights(ray_cluster):
    async def scenario(started):
        version = await started.plan()
        await started.pool.ready[0].handle.die_at.remote(2)
        await started.generators.load(started.learner.publish(), version)
        assert await served(started.pool) == [all_of(version)]
        while len(started.pool.ready) < 2:
            await asyncio.sleep(0.1)
        return await served(started.pool)

    assert run(scenario, replicas=2) == [all_of(1)] * 2


def test_a_replica_that_reports_another_version_is_an_error(ray_cluster):
    async def scenario(started):
        version = await started.plan()
        [replica] = started.pool.ready
        replica.handle = Liar(replica.handle)
        with pytest.raises(RoleError, match=r"Served\(0\) was to load weights version 1, but it holds version 0"):
            await started.generators.load(started.learner.publish(), version)
        replica.handle = replica.handle.replica

    run(scenario)


class Liar:
    """A handle whose replica swaps, but reports the version before."""

    def __init__(self, replica) -> None:
        self.replica = replica
        self.stage = replica.stage
        self.swap = self

    async def remote(self, version: int) -> tuple[int, float]:
        held, pause_s = await self.replica.swap.remote(version)
        return held - 1, pause_s


# In shared processes: one after another, so that their event loop never waits long


def test_a_replica_that_forgets_its_base_is_sent_the_full_set(shared):
    shared(partial(refused_deltas, changes=CHANGES_BYTES, full=FULL_BYTES))


def test_a_replica_that_refuses_the_full_set_keeps_its_weights(shared):
    async def scenario(started):
        before, _ = await started.publish()
        [replica, _] = started.pool.ready
        await replica.handle.refuse_at.remote(2)
        version = await started.plan()
        with pytest.raises(CorruptWeightsError, match="told to refuse"):
            await started.generators.load(started.learner.publish(), version)
        assert await served(started.pool) == [all_of(before)] * 2
        await replica.handle.refuse_at.remote(-1)
        after, _ = await started.publish()
        assert await served(started.pool) == [all_of(after)] * 2

    shared(scenario)


@pytest.mark.parametrize(
    ("trouble", "where", "error", "message"),
    [
        ("error", 0, ValueError, "cannot gather"),
        ("error", 1, ValueError, "cannot gather"),
        ("death", 0, RankLostError, r'Learner\(0\) died during "publish weights at step 0"'),
    ],
)
def test_after_a_publication_that_breaks_off_the_old_weights_serve(shared, trouble, where, error, message):
    shared(partial(broken_publication, trouble=trouble, where=where, error=error, message=message))
