"""Weight updates on real Ray: from a group of publishing ranks to a pool of generators, and what may break between."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time

import pytest
import ray
import torch
from ray._private.internal_api import memory_summary

from actors.generator import Generator
from actors.pool import Pool, RoleError
from actors.ray_host import start_pool
from actors.services import GeneratorPool
from common.config import RayConfig, Replicated
from common.weights import buckets
from deploy.cluster import cluster
from learner.group import LearnerGroup

pytestmark = pytest.mark.ray

NUM_BUCKETS, VALUES = 6, 1 << 20
BUCKET_BYTES = 2 * VALUES


class Rank:
    """Publishes `version` everywhere in every tensor; misbehaves before bucket 3 as told."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        return 0

    def publish(self):
        version, trouble = self._plan

        def named_tensors():
            for index in range(NUM_BUCKETS):
                if index == 3 and trouble == "error":
                    raise ValueError("cannot gather")
                if index == 3 and trouble == "death":
                    os.kill(os.getpid(), signal.SIGKILL)
                if index == 3 and trouble == "silence":
                    time.sleep(60)
                yield f"w{index}", torch.full((VALUES,), float(version))

        if self._rank > 0:  # takes part in gathering, and yields nothing
            list(named_tensors())
            return
        for bucket in buckets(named_tensors(), version, bucket_bytes=BUCKET_BYTES):
            yield bucket
            yield bucket.index

    def plan(self, version: int, trouble: str = "") -> None:
        self._plan = version, trouble


class SumEngine:
    """Serves the sums of its weights; may be told to lose its process at a bucket."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.staged: dict[str, float] = {}
        self.die_at = -1

    async def stage(self, bucket) -> None:
        if bucket.index == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if bucket.index == 0:
            self.staged = {}
        self.staged.update((name, float(tensor.float().mean())) for name, tensor in bucket.tensors())

    async def swap(self, version: int) -> None:
        self.weights = self.staged


class Served(Generator):
    def __init__(self, name: str) -> None:
        super().__init__(name, 0, SumEngine)

    async def weights(self) -> tuple[int, dict[str, float]]:
        return self._version, self._engine.weights

    async def die_at(self, index: int) -> None:
        self._engine.die_at = index


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster(RayConfig(object_store_mib=128, dashboard=False)) as nodes:
        yield nodes


def run(scenario, *, ranks: int = 1, replicas: int = 1, timeout_s: float = 30):
    """`scenario(learner, generators, pool, plan)`, with everything started and stopped around it."""

    async def whole():
        handles = [ray.remote(num_cpus=0)(Rank).remote(rank) for rank in range(ranks)]
        learner = LearnerGroup(handles, timeout_s=timeout_s)
        pool = await start_pool(
            Served,
            Replicated(min=replicas, cpus=0),
            startup_timeout_s=60,
        )

        async def plan(version: int, troubles: tuple[str, ...] = ("",) * ranks) -> None:
            await asyncio.gather(*(rank.plan.remote(version, t) for rank, t in zip(handles, troubles, strict=True)))

        try:
            return await scenario(learner, GeneratorPool(pool), pool, plan)
        finally:
            pool.stop()
            for rank in handles:
                ray.kill(rank)

    return asyncio.run(asyncio.wait_for(whole(), 120))


async def served(pool: Pool) -> list[tuple[int, dict[str, float]]]:
    return list((await pool.broadcast("tell", lambda replica: replica.weights.remote())).values())


def all_of(version: int) -> tuple[int, dict[str, float]]:
    return version, {f"w{index}": float(version) for index in range(NUM_BUCKETS)}


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (3, 2)])
def test_every_replica_serves_what_rank_0_published_and_the_store_keeps_the_newest_set(ray_cluster, ranks, replicas):
    async def scenario(learner, generators, pool, plan):
        for version in (1, 2, 3):
            await plan(version)
            await generators.load(learner.publish(), version)
            assert await served(pool) == [all_of(version)] * replicas
        gc.collect()  # pools of earlier tests, and what they held
        deadline = time.monotonic() + 20
        while f" {NUM_BUCKETS} objects" not in memory_summary(stats_only=True):
            assert time.monotonic() < deadline, memory_summary(stats_only=True)
            await asyncio.sleep(0.2)

    run(scenario, ranks=ranks, replicas=replicas)


def test_buckets_are_owned_here_and_outlive_the_rank(ray_cluster):
    async def scenario(learner, generators, pool, plan):
        await plan(7)
        handles = [bucket async for bucket in learner.publish()]
        ray.kill(learner._ranks[0])
        await asyncio.sleep(0.5)

        async def stored():
            for handle in handles:
                yield handle

        await generators.load(stored(), 7)
        return await served(pool)

    assert run(scenario) == [all_of(7)]


@pytest.mark.parametrize(
    ("trouble", "where", "error", "message"),
    [
        ("error", 0, ValueError, "cannot gather"),
        ("error", 1, ValueError, "cannot gather"),
        ("death", 0, ray.exceptions.RayActorError, "died"),
        ("silence", 0, RuntimeError, "did not publish weights at step 0 within 3 s"),
    ],
)
def test_a_publication_that_breaks_off_costs_no_generator_and_leaves_the_old_weights(
    ray_cluster, trouble, where, error, message
):
    async def scenario(learner, generators, pool, plan):
        await plan(1)
        await generators.load(learner.publish(), 1)
        await plan(2, tuple(trouble if rank == where else "" for rank in range(2)))
        with pytest.raises(error, match=message):
            await generators.load(learner.publish(), 2)
        assert await served(pool) == [all_of(1)] * 2
        for index in range(2):  # a group whose rank is gone is rebuilt by others; here a new one takes over
            ray.kill(learner._ranks[index])
        learner._ranks = [ray.remote(num_cpus=0)(Rank).remote(0)]
        await learner._ranks[0].plan.remote(3)
        await generators.load(learner.publish(), 3)
        assert await served(pool) == [all_of(3)] * 2

    run(scenario, ranks=2, replicas=2, timeout_s=3)


def test_a_replica_that_dies_in_between_is_replaced_by_one_with_the_newest_weights(ray_cluster):
    async def scenario(learner, generators, pool, plan):
        await plan(1)
        await pool.ready[0].handle.die_at.remote(2)
        await generators.load(learner.publish(), 1)
        assert await served(pool) == [all_of(1)]
        while len(pool) < 2:
            await asyncio.sleep(0.1)
        return await served(pool)

    assert run(scenario, replicas=2) == [all_of(1)] * 2


def test_a_replica_that_reports_another_version_is_an_error(ray_cluster):
    async def scenario(learner, generators, pool, plan):
        await plan(4)
        [replica] = pool.ready
        replica.handle = Liar(replica.handle)
        with pytest.raises(RoleError, match=r"wanted weights version 4 on Served\(0\), but it holds 3"):
            await generators.load(learner.publish(), 4)
        replica.handle = replica.handle.replica

    run(scenario)


class Liar:
    """A handle whose replica swaps and then reports the version before."""

    def __init__(self, replica) -> None:
        self.replica = replica
        self.stage = replica.stage
        self.swap = self

    async def remote(self, version: int) -> int:
        return await self.replica.swap.remote(version) - 1
