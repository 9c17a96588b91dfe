"""Weight updates on real Ray, from publishing ranks to a pool of generators, with failures on both sides."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from contextlib import suppress
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


def run(scenario, *, ranks: int = 1, replicas: int = 1, timeout_s: float = 30, updates: str = "changes"):
    """Runs `scenario(learner, generators, pool, plan)` with everything started before and stopped after it."""

    async def whole():
        handles: dict[int, Any] = {}  # the newest ones

        def create(rank: int) -> Any:
            handles[rank] = ray.remote(num_cpus=0, concurrency_groups={"health": 1})(Rank).remote(rank)
            return handles[rank]

        cfg = LearnerConfig(ranks=ranks, timeout_s=timeout_s)
        learner = LearnerGroup(create, cfg, startup_timeout_s=240, deltas=True)
        await learner.start()
        cfg = Replicated(min=replicas, cpus=0)
        generators = GeneratorPool(RayHost(Served, cfg, updates), cfg)
        pool = await generators.pool.start(240)

        async def plan(version: int, troubles: tuple[str, ...] = ("",) * ranks) -> None:
            await asyncio.gather(*(handles[rank].plan.remote(version, t) for rank, t in enumerate(troubles)))

        try:
            return await scenario(learner, generators, pool, plan)
        finally:
            pool.stop()
            learner.stop()

    return asyncio.run(asyncio.wait_for(whole(), 400))


async def served(pool: Pool) -> list[tuple[int, dict[str, float]]]:
    return list((await pool.each(lambda replica: replica.handle.weights.remote())).values())


def all_of(version: int) -> tuple[int, dict[str, float]]:
    return version, {f"w{index}": VALUES / 8 * (7 + version) for index in range(NUM_BUCKETS)}


def stored() -> str:
    """What this cluster's object store holds. Without the address Ray would ask any cluster of the machine."""
    return memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (3, 2)])
def test_every_replica_serves_the_published_set_and_only_one_is_stored(ray_cluster, ranks, replicas):
    async def scenario(learner, generators, pool, plan):
        for version in (1, 2, 3):
            await plan(version)
            sent = await generators.load(learner.publish(), version)
            assert await served(pool) == [all_of(version)] * replicas
            expected = FULL_BYTES if version == 1 else CHANGES_BYTES
            assert sent == {"weights/bytes": replicas * expected, "weights/pause_s": PAUSE_S}
        gc.collect()  # references held by pools of earlier tests
        deadline = time.monotonic() + 60
        while f" {NUM_BUCKETS} objects" not in stored():
            assert time.monotonic() < deadline, stored()
            await asyncio.sleep(0.2)
        assert len(learner._base) == NUM_BUCKETS

    run(scenario, ranks=ranks, replicas=replicas)


@pytest.mark.parametrize("updates", ["full", "changes"])
def test_a_replica_that_refuses_deltas_is_sent_the_full_set(ray_cluster, updates):
    async def scenario(learner, generators, pool, plan):
        for version in (1, 2):
            await plan(version)
            sent = await generators.load(learner.publish(), version)
            await pool.ready[0].handle.forget.remote()
            assert await served(pool) == [all_of(version)] * 2
        changes, full = (CHANGES_BYTES, FULL_BYTES) if updates == "changes" else (0, 2 * FULL_BYTES)
        # Plus the refused deltas: of at least one bucket and at most all, for each replica.
        assert changes + full < sent["weights/bytes"] <= changes + full + 2 * CHANGES_BYTES

    run(scenario, replicas=2, updates=updates)


def test_a_replica_that_refuses_the_full_set_keeps_its_weights(ray_cluster):
    async def scenario(learner, generators, pool, plan):
        await plan(1)
        await generators.load(learner.publish(), 1)
        await pool.ready[0].handle.refuse_at.remote(2)
        await plan(2)
        with pytest.raises(CorruptWeightsError, match="told to refuse"):
            await generators.load(learner.publish(), 2)
        assert await served(pool) == [all_of(1)] * 2
        await pool.ready[0].handle.refuse_at.remote(-1)
        await plan(3)
        await generators.load(learner.publish(), 3)
        assert await served(pool) == [all_of(3)] * 2

    run(scenario, replicas=2)


def test_published_buckets_outlive_the_rank(ray_cluster):
    async def scenario(learner, generators, pool, plan):
        await plan(7)
        handles = [bucket async for bucket in learner.publish()]
        [rank] = learner._processes.handles
        ray.kill(rank)
        with suppress(ray.exceptions.RayActorError):  # raised as soon as it is dead
            while True:
                await rank.plan.remote(8)

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
        ("death", 0, RankLostError, r"Learner\(0\) died while it was to publish weights at step 0"),
        ("silence", 0, RankLostError, "did not publish weights at step 0 within 5 s"),
    ],
)
def test_after_a_publication_that_breaks_off_the_old_weights_serve(ray_cluster, trouble, where, error, message):
    async def scenario(learner, generators, pool, plan):
        await plan(1)
        await generators.load(learner.publish(), 1)
        await plan(2, tuple(trouble if rank == where else "" for rank in range(2)))
        with pytest.raises(error, match=message):
            await generators.load(learner.publish(), 2)
        assert await served(pool) == [all_of(1)] * 2
        await learner.rebuild()
        await plan(2)
        sent = await generators.load(learner.publish(), 2)  # the same version again, and complete
        assert sent["weights/bytes"] == 2 * FULL_BYTES
        assert await served(pool) == [all_of(2)] * 2

    run(scenario, ranks=2, replicas=2, timeout_s=5 if trouble == "silence" else 60)


def test_a_replica_that_dies_is_replaced_by_one_with_the_newest_weights(ray_cluster):
    async def scenario(learner, generators, pool, plan):
        await plan(1)
        await pool.ready[0].handle.die_at.remote(2)
        await generators.load(learner.publish(), 1)
        assert await served(pool) == [all_of(1)]
        while len(pool.ready) < 2:
            await asyncio.sleep(0.1)
        return await served(pool)

    assert run(scenario, replicas=2) == [all_of(1)] * 2


def test_a_replica_that_reports_another_version_is_an_error(ray_cluster):
    async def scenario(learner, generators, pool, plan):
        await plan(4)
        [replica] = pool.ready
        replica.handle = Liar(replica.handle)
        with pytest.raises(RoleError, match=r"Served\(0\) was to load weights version 4, but it holds version 3"):
            await generators.load(learner.publish(), 4)
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
