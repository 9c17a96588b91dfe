"""Generators behind the loop's protocol: responses that move between replicas, and weights that reach all of them."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.generation.engine import Completion
from actors.generation.generator import Generator
from actors.pool import deaths
from actors.pool.replica import PoolEvent
from actors.pool.roles import GeneratorPool, RewardPool
from common.config.base import Replicated
from common.errors import CorruptWeightsError, EngineDeadError, RankLostError
from common.types import HANDED_OVER, Manifest, PublishedBucket, RolloutRef, SampleId, Score, Void
from common.weights import Bucket, buckets, publication
from tests.actors.pool.scenario import Started, run, until
from tests.fakes import LocalHost, make_prompt


class SlowEngine:
    """Writes the token `version` every 10 ms, up to `max_tokens` times, with log-probabilities 0, -1, -2, ..."""

    stage_s = 0.02

    def __init__(self, max_tokens: int = 40) -> None:
        self.begun: list[int] = []
        self.version = self.staged = 0
        self.max_tokens = max_tokens
        self.leaving = self.asleep = False
        self.stages: list[int] = []

    async def generate(
        self,
        prompt_ids: np.ndarray,
        *,
        seed: int,
        num_begun: int = 0,
        plain_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> Completion:
        if plain_tokens:
            ids = np.zeros(plain_tokens, dtype=np.int32)
            return Completion(ids, ids.astype(np.float32), ids + self.version, "length")
        self.begun.append(num_begun)
        tokens: list[int] = []
        while num_begun + len(tokens) < self.max_tokens and not self.leaving:
            await asyncio.sleep(0.01)
            if not self.asleep:
                tokens.append(self.version)
        numbers = np.arange(num_begun, num_begun + len(tokens), dtype=np.float32)
        ids = np.array(tokens, dtype=np.int32)
        return Completion(ids, -numbers, ids, HANDED_OVER if self.leaving else "length")

    async def hand_over(self) -> None:
        self.leaving = True

    async def stage(self, bucket) -> None:
        await asyncio.sleep(self.stage_s)
        self.staged = bucket.version

    async def swap(self, version: int) -> float:
        assert (self.staged, self.asleep) == (version, False)
        self.version = version
        return 0.0

    async def sleep(self) -> None:
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False


async def generators(max_tokens: int = 40, room: int = 1 << 30, **settings) -> tuple[Started, GeneratorPool]:
    host = LocalHost(Generator, 0, lambda: SlowEngine(max_tokens), room=room)
    events: list[PoolEvent] = []
    service = GeneratorPool(host, Replicated(**settings), on_event=events.append)
    return Started(host, await service.pool.start(timeout_s=5), events), service


async def published(version: int):
    for bucket in buckets([("w", torch.full((4,), float(version)))], version):
        yield PublishedBucket(bucket, bucket)
    yield Manifest((8,), (8,))


def test_another_generator_continues_the_responses_of_one_that_leaves():
    async def scenario():
        it, service = await generators(min=2, drain_s=0.1)
        calls = [asyncio.create_task(service.generate(make_prompt(i))) for i in range(4)]
        await asyncio.sleep(0.05)
        it.host.leaving = {"node of Generator(0)": 60.0}
        await until(lambda: it.told("left") == ["Generator(0)"])
        assert [event.calls for event in it.events if event.event == "left"] == [2]  # handed over
        await service.load(published(1), 1)
        it.host.leaving = {}
        rollouts = await service.fetch([(await call).rollout for call in calls])
        for rollout in rollouts:
            # Every token is there once, with the log-probability from when it was sampled.
            assert rollout.rollout_logprobs.tolist() == [-float(i) for i in range(40)]
            assert rollout.finish_reason == "length"
            assert (rollout.response_ids == rollout.policy_versions).all()
            assert (np.diff(rollout.policy_versions) >= 0).all()
        assert "Generator(0)" not in {rollout.generator for rollout in rollouts}
        assert any(set(rollout.policy_versions) == {0, 1} for rollout in rollouts)
        engines = [handle.role._engine for handle in it.host.handles]
        assert sum(begun > 0 for engine in engines for begun in engine.begun) == 2  # continued, not started again

    run(scenario)


def test_a_call_that_waits_for_a_sleeping_engine_does_not_run_out_of_time():
    async def scenario():
        _, service = await generators(min=1, timeout_s=0.6)
        call = asyncio.create_task(service.generate(make_prompt(0)))
        await asyncio.sleep(0.02)
        await service.sleep()
        late = asyncio.create_task(service.generate(make_prompt(1)))
        await asyncio.sleep(1.0)  # longer than the limit
        assert [each.done() for each in (call, late)] == [False, False]
        await service.wake()
        assert [(await each).num_tokens > 0 for each in (call, late)] == [True, True]

    run(scenario)


def test_no_replica_starts_while_the_others_sleep():
    async def scenario():
        it, service = await generators(min=2, probe_timeout_s=0.1)
        await service.sleep()
        it.host.alive("Generator(0)").silent = True
        await until(lambda: it.told("died") == ["Generator(0)"])
        await asyncio.sleep(1.2)  # more than two looks at the pool's size
        assert it.told("joined") == ["Generator(0)", "Generator(1)"]
        await service.wake()
        await until(lambda: it.told("joined") == ["Generator(0)", "Generator(1)", "Generator(0)"])

    run(scenario)


def test_a_response_starts_again_when_its_first_part_is_lost():
    async def scenario():
        it, service = await generators(min=1)

        async def gone():
            raise LookupError("its node is gone")

        lost = asyncio.ensure_future(gone())
        handle = it.host.alive("Generator(0)")
        answer = handle.role.generate
        asked = []

        async def begin(prompt, begun, plain_tokens):
            asked.append(begun)
            rollout, ref = await answer(prompt, begun, plain_tokens)
            return rollout, ref

        handle.role.generate = begin
        generate = service.pool.call

        async def hands_over_first(what, call, **options):
            if not asked:
                asked.append("first")
                _, ref = await generate(what, call, **options)
                return lost, replace(ref, finished=False)
            return await generate(what, call, **options)

        service.pool.call = hands_over_first
        ref = await service.generate(make_prompt(3))
        assert ref.finished
        assert asked == ["first", None, None]  # at first it was given the lost part, which failed; then none
        [rollout] = await service.fetch([ref.rollout])
        assert rollout.rollout_logprobs.tolist() == [-float(i) for i in range(40)]

    run(scenario)


def test_a_late_replica_loads_the_newest_weights_before_it_gets_prompts():
    async def scenario():
        it, service = await generators(min=1, max=2, max_tokens=1, room=1)
        await service.load(published(1), 1)
        await service.load(published(2), 2)
        it.host.make_room(2)
        await until(lambda: len(it.pool.ready) == 2)
        versions = {}
        for _ in range(8):
            ref = await service.generate(make_prompt())
            [rollout] = await service.fetch([ref.rollout])
            versions[rollout.generator] = set(rollout.policy_versions)
        assert versions == {"Generator(0)": {2}}
        calls = [service.generate(make_prompt(i)) for i in range(8)]
        for ref in await asyncio.gather(*calls):
            [rollout] = await service.fetch([ref.rollout])
            assert set(rollout.policy_versions) == {2}, rollout.generator

    run(scenario)


def test_a_replica_that_catches_up_also_loads_a_version_published_then():
    async def scenario():
        it, service = await generators(min=1, max=2, max_tokens=1, room=1)
        await service.load(published(1), 1)
        await until(lambda: len(it.host.handles) == 2)
        it.host.make_room(2)
        it.host.handles[1].role._engine.stage_s = 0.2
        await asyncio.sleep(0.05)
        await service.load(published(2), 2)
        assert len(it.pool.ready) == 1  # the other replica still stages version 1
        await until(lambda: len(it.pool.ready) == 2)
        assert [replica.handle.role._version for replica in it.pool.ready] == [2, 2]

    run(scenario)


def test_every_routable_replica_holds_the_newest_version():
    async def scenario():
        it, service = await generators(min=1, max=6, max_tokens=1)
        it.host.room = 2
        wrong: list[str] = []
        opened = it.pool._router.open

        def check_and_open(number):
            replica = it.pool.members.find(number)
            newest = service.weights.version
            if replica.handle.role._version != newest:
                wrong.append(f"{replica.name} holds {replica.handle.role._version}, the newest is {newest}")
            opened(number)

        it.pool._router.open = check_and_open
        for version in range(1, 8):
            publication = asyncio.create_task(service.load(published(version), version))
            await asyncio.sleep(0.007 * version)
            it.host.make_room(min(6, 1 + version))
            if version == 4:
                it.host.alive("Generator(1)").die()
            await publication
            assert all(replica.handle.role._version == version for replica in it.pool.ready)
            answers = [asyncio.create_task(service.generate(make_prompt(i))) for i in range(12)]
            for answer in answers:
                [rollout] = await service.fetch([(await answer).rollout])
                assert set(rollout.policy_versions) == {version}
        assert not wrong
        await until(lambda: len(it.pool.ready) == 6)

    run(scenario)


def two_buckets(version: int) -> list[Bucket]:
    """64 values of 2 bytes each in both; the first value is the version."""
    values = torch.tensor([float(version)] + [1.0] * 63)
    return list(buckets([("a", values), ("b", values)], version, bucket_bytes=128))


async def published_since(base: list[Bucket], version: int):
    *parts, manifest = publication(two_buckets(version), base)
    for full, best in zip(parts[::2], parts[1::2], strict=True) if base else zip(parts, parts, strict=True):
        yield PublishedBucket(full, best)
    yield manifest


def test_a_replica_that_refuses_a_delta_is_sent_the_full_set():
    async def scenario():
        host = LocalHost(Generator, 0, SlowEngine, updates="changes")
        service = GeneratorPool(host, Replicated(min=2))
        await service.pool.start(timeout_s=5)
        sent = [await service.load(published_since(two_buckets(version - 1), version), version) for version in (1, 2)]
        host.alive("Generator(1)").role._held = {}
        sent.append(await service.load(published_since(two_buckets(2), 3), 3))
        # A delta is one value of 6 bytes. Nobody holds version 0. In the end one replica refuses the first delta.
        assert [each["weights/bytes"] for each in sent] == [2 * (6 + 256), 2 * (6 + 6), (6 + 6) + (6 + 256)]
        assert [replica.version for replica in service.pool.ready] == [3, 3]
        service.pool.stop()

    run(scenario)


@pytest.mark.parametrize("where", ["the learner fails", "a replica refuses"])
def test_a_failed_load_ends_the_publication_and_keeps_the_old_weights(where):
    async def scenario():
        _, service = await generators(min=2, max_tokens=1)
        ended = []

        async def weights():
            try:
                async for item in published(1):
                    if where == "a replica refuses":
                        bad = replace(item.full, checksum=0)
                        item = PublishedBucket(bad, bad)
                    yield item
                    raise ValueError("cannot gather")
            finally:
                ended.append(True)

        with pytest.raises(CorruptWeightsError if where == "a replica refuses" else ValueError):
            await service.load(weights(), 1)
        assert ended
        refs = await asyncio.gather(*(service.generate(make_prompt(i)) for i in range(8)))
        rollouts = await service.fetch([ref.rollout for ref in refs])
        assert {rollout.generator for rollout in rollouts} == {"Generator(0)", "Generator(1)"}
        assert {version for rollout in rollouts for version in rollout.policy_versions} == {0}

    run(scenario)


class Summing(SlowEngine):
    """Serves the sum of the values it was sent."""

    stage_s = 0.0
    sum = 0.0

    async def stage(self, bucket) -> None:
        if bucket.index == 0:
            self.incoming = 0.0
        self.incoming += sum(tensor.double().sum().item() for _, tensor in bucket.tensors())
        await super().stage(bucket)

    async def swap(self, version: int) -> float:
        self.sum = self.incoming
        return await super().swap(version)


async def summing(room: int = 1 << 30, **settings) -> tuple[LocalHost, GeneratorPool]:
    host = LocalHost(Generator, 0, Summing, updates="changes", room=room)
    service = GeneratorPool(host, Replicated(**settings))
    await service.pool.start(timeout_s=5)
    return host, service


def sums(service: GeneratorPool) -> list[tuple[int, float]]:
    return [(replica.handle.role._version, replica.handle.role._engine.sum) for replica in service.pool.ready]


async def cut_after(number: int, weights):
    """The learner is lost after this many buckets."""
    async for item in weights:
        if number == 0:
            raise RankLostError("Learner(0) died")
        number -= 1
        yield item


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_version_whose_publication_was_cut_is_loaded_from_its_beginning(number):
    async def scenario():
        _, service = await summing(min=2)
        await service.load(published_since(two_buckets(0), 1), 1)
        with pytest.raises(RankLostError, match="died"):
            await service.load(cut_after(number, published_since(two_buckets(1), 2)), 2)
        assert sums(service) == [(1, 2 * (1 + 63))] * 2
        sent = await service.load(published_since([], 2), 2)
        assert sent["weights/bytes"] == 2 * 256  # complete
        assert sums(service) == [(2, 2 * (2 + 63))] * 2
        await service.load(published_since(two_buckets(2), 3), 3)
        assert sums(service) == [(3, 2 * (3 + 63))] * 2

    run(scenario)


def other_two_buckets(version: int) -> list[Bucket]:
    """As another number of ranks computes them: with another rounding."""
    return list(buckets([(name, torch.full((64,), 0.5)) for name in "ab"], version, bucket_bytes=128))


async def published_again(version: int):
    for part in other_two_buckets(version):
        yield PublishedBucket(part, part)
    yield Manifest((128, 128), (128, 128))


def test_a_version_that_is_in_use_is_loaded_again_from_a_new_group():
    """Also by a replica that joins meanwhile."""

    async def scenario():
        host, service = await summing(min=1, max=2, room=1)
        await service.load(published_since([], 1), 1)
        host.make_room(2)
        await until(lambda: len(host.handles) == 2)
        Summing.stage_s = 0.1  # the second replica stages the old set while the new one is loaded
        try:
            await service.load(published_again(1), 1)
            await until(lambda: len(service.pool.ready) == 2)
        finally:
            Summing.stage_s = 0.0
        assert sums(service) == [(1, 64.0)] * 2

    run(scenario)


def lost() -> asyncio.Future[Bucket]:
    """A reference whose node is gone."""
    reference = asyncio.get_running_loop().create_future()
    reference.set_exception(LookupError("its node is gone"))
    reference.exception()  # read, so that asyncio prints nothing
    return reference


def test_weights_that_are_lost_on_their_way_are_a_lost_learner():
    async def scenario():
        _, service = await summing(min=2)

        async def half_lost():
            first, _ = two_buckets(1)
            yield PublishedBucket(first, first)
            gone = lost()
            yield PublishedBucket(gone, gone)

        with pytest.raises(
            RankLostError, match="weights version 1 were lost with the node of the rank that packed them"
        ):
            await service.load(half_lost(), 1)
        assert len(service.pool.ready) == 2
        await service.load(published_since([], 1), 1)
        assert sums(service) == [(1, 2 * (1 + 63))] * 2

    run(scenario)


def test_a_replica_waits_for_the_next_set_if_the_newest_one_is_lost():
    async def scenario():
        host, service = await summing(min=1, max=2, room=1)
        await service.load(published_since([], 1), 1)
        service.weights._newest = replace(service.weights._newest, buckets=[lost()] * 2)
        host.make_room(2)
        await until(lambda: [replica.state for replica in service.pool.members.replicas] == ["ready", "starting"])
        await asyncio.sleep(0.1)
        assert len(service.pool.ready) == 1
        await service.load(published_since([], 2), 2)
        await until(lambda: len(service.pool.ready) == 2)
        assert sums(service) == [(2, 2 * (2 + 63))] * 2
        assert service.pool.members.last_death == "None"

    run(scenario)


class DyingEngine(SlowEngine):
    async def stage(self, bucket: Bucket) -> None:
        raise EngineDeadError("out of memory")


@pytest.mark.parametrize("dies", ["of a delta", "as it catches up"])
def test_the_error_of_a_dead_replica_does_not_keep_weights_alive(monkeypatch, dies):
    """Without collections of cycles, because they are rare in a run."""

    async def scenario():
        host = LocalHost(Generator, 0, SlowEngine, updates="changes", room=1 if dies == "as it catches up" else 2)
        service = GeneratorPool(host, Replicated(min=1, max=2))
        await service.pool.start(timeout_s=5)
        sent: list[weakref.ref] = []

        async def noted(version: int):
            async for item in published_since(two_buckets(version - 1), version):
                if isinstance(item, PublishedBucket):
                    sent.extend(map(weakref.ref, (item.full, item.best)))
                yield item

        await service.load(published_since([], 1), 1)
        await until(lambda: len(service.pool.ready) == host.room)
        if dies == "of a delta":
            host.alive("Generator(1)").role._engine = DyingEngine()
        await service.load(noted(2), 2)
        if dies == "as it catches up":
            host.make_room(2)
            host.alive("Generator(1)").role._engine = DyingEngine()
        await until(lambda: service.pool.members.last_death == "out of memory")
        host.handles[1].role = None  # its process is gone
        await service.load(published_since([], 3), 3)
        assert [ref() for ref in sent] == [None] * 4
        service.pool.stop()

    monkeypatch.setattr(deaths, "BACKOFF_S", 60.0)
    gc.disable()
    try:
        run(scenario)
    finally:
        gc.enable()


def test_the_failures_of_sources_and_judges_are_kept():
    void, kept = Void(SampleId(-1, 0, 0), "judge gold is down"), []

    class Replicas:
        async def call(self, what, call, cost):
            return answers.pop()

    def keep(void):
        kept.append(void)
        return replace(void, reason=f"{void.reason}; see errors/01.txt")

    answers = [Score(1.0, {"rm": 1.0}), Score(1.0, {"rm": 1.0}, judge_voids={"gold": void}), void]
    reward = RewardPool(Replicas(), keep)
    found = [asyncio.run(reward.judge(RolloutRef(void.sample_id, 3, 0, True))) for _ in range(3)]
    told = replace(void, reason="judge gold is down; see errors/01.txt")
    assert found == [told, Score(1.0, {"rm": 1.0}, judge_voids={"gold": told}), Score(1.0, {"rm": 1.0})]
    assert kept == [void, void]
