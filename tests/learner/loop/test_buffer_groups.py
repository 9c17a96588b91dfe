"""Groups: all responses to one prompt stay in one batch, after voids, losses and resumes too."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from common.errors import RolloutLostError
from common.types import ExperienceRef, PromptRecord, SampleId, Void
from learner.loop.buffer import RolloutBuffer
from learner.loop.prompts import PromptStream
from learner.loop.train_loop import train
from tests.fakes import FakeRoles, fetch_scored, make_scored, pending, tiny_config
from tests.learner.loop.test_train_loop import make_run


def scored(prompt: int, replica: int, version: int = 0) -> ExperienceRef:
    return named(make_scored(prompt, [4, 1], version=version), SampleId(0, prompt, replica))


def named(row: ExperienceRef, sample_id: SampleId) -> ExperienceRef:
    prompt = replace(row.ref.rollout.prompt, sample_id=sample_id)
    rollout = replace(row.ref.rollout, prompt=prompt)
    return replace(row, ref=replace(row.ref, sample_id=sample_id, rollout=rollout))


def ids(batch) -> list[tuple[int, int]]:
    return [(row.rollout.prompt.sample_id.prompt, row.rollout.prompt.sample_id.replica) for row in batch.experience]


def void(prompt: int, replica: int, reason: str = "broken", asked_again: bool = False) -> Void:
    return Void(SampleId(0, prompt, replica), reason, asked_again)


def test_a_group_waits_for_its_last_rollout_and_keeps_their_order():
    async def scenario():
        buffer = RolloutBuffer(2, 0, fetch=fetch_scored, group_size=2)
        ticket = await buffer.admit()
        await buffer.put(ticket, scored(7, 1), 1)
        assert buffer.num_finished(2) == 1
        taking = await pending(buffer.take(2, policy_version=0))
        await buffer.put(ticket, scored(7, 0), 0)
        assert ids(await taking) == [(7, 0), (7, 1)]

    asyncio.run(scenario())


def test_a_void_leaves_a_smaller_group_that_keeps_its_slots():
    async def scenario():
        buffer = RolloutBuffer(4, 0, fetch=fetch_scored, group_size=2)
        first, second = await buffer.admit(), await buffer.admit()
        await buffer.put(first, void(1, 0), 0)
        await buffer.put(first, scored(1, 1), 1)
        third = await pending(buffer.admit())
        for replica in (0, 1):
            await buffer.put(second, scored(2, replica), replica)
        batch = await buffer.take(4, policy_version=0)
        assert ids(batch) == [(1, 1), (2, 0), (2, 1)]
        assert batch.voids == [void(1, 0)]
        assert batch.stats["staleness/generating_s"] >= 0
        assert not third.done()
        await buffer.release(4)
        assert await third == 3

    asyncio.run(scenario())


def test_another_prompt_takes_the_place_of_a_group_that_is_all_void():
    async def scenario():
        buffer = RolloutBuffer(2, 0, fetch=fetch_scored, group_size=2, wanted=2)
        ticket = await buffer.admit()
        await buffer.put(ticket, void(1, 1), 1)
        waiting = await pending(buffer.admit())
        await buffer.put(ticket, void(1, 0), 0)
        ticket = await asyncio.wait_for(waiting, 5)
        for replica in (0, 1):
            await buffer.put(ticket, scored(2, replica), replica)
        batch = await buffer.take(2, policy_version=0)
        assert ids(batch) == [(2, 0), (2, 1)]
        assert batch.voids == [void(1, 0), void(1, 1)]

    asyncio.run(scenario())


@pytest.mark.parametrize("cause", ["lost", "old"])
def test_a_rollout_that_is_asked_again_takes_its_whole_group_along(cause):
    async def fetch(rows):
        fetched = await fetch_scored(rows)
        if cause == "lost":
            fetched = [RolloutLostError("gone") if r.rollout.prompt.sample_id[1:] == (1, 2) else r for r in fetched]
        return fetched

    async def scenario():
        buffer = RolloutBuffer(3, 1, fetch=fetch, group_size=3)
        first, second = await buffer.admit(), await buffer.admit()
        await buffer.put(first, scored(1, 0, version=1), 0)
        await buffer.put(first, void(1, 1), 1)
        await buffer.put(first, scored(1, 2, version=0 if cause == "old" else 1), 2)
        for replica in range(3):
            await buffer.put(second, scored(2, replica, version=1), replica)
        batch = await buffer.take(3, policy_version=2)
        assert ids(batch) == [(2, 0), (2, 1), (2, 2)]
        found = {void.sample_id.replica: void.reason for void in batch.voids}
        assert all(void.asked_again and void.sample_id.prompt == 1 for void in batch.voids)
        reason = "gone" if cause == "lost" else "its oldest token is more than 1 versions old"
        assert found == {0: "another response to its prompt must be generated again", 1: "broken", 2: reason}
        assert buffer._bytes == 0
        assert await buffer.admit() == 3

    asyncio.run(scenario())


def test_a_batch_that_does_not_divide_into_groups_is_refused():
    with pytest.raises(ValueError, match=r"rollouts_per_step \(4\) must divide into groups of 3"):
        RolloutBuffer(4, 0, fetch=fetch_scored, group_size=3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("size", "batch_size"), [(1, 3), (2, 4), (3, 3), (4, 12)])
def test_in_any_order_of_events_no_group_is_split_and_slots_return(size, batch_size, seed):
    """Rollouts end in random order; some are void, lost or written by a late replica; the consumer publishes late."""
    rng = random.Random(1000 * seed + size)
    max_staleness, steps = seed % 3, 10
    records = [PromptRecord(f"q{i}", np.array([3], dtype=np.int32), {}) for i in range(5)]  # several epochs
    prompts = PromptStream(records, seed=seed, rollouts_per_prompt=size)
    version = admitted = 0

    async def fetch(rows):
        fetched = await fetch_scored(rows)
        return [RolloutLostError("gone") if rng.random() < 0.03 else row for row in fetched]

    async def scenario() -> None:
        nonlocal version, admitted
        buffer = RolloutBuffer(batch_size, max_staleness, fetch=fetch, group_size=size)

        async def rollout(ticket, member, prompt):
            born = version - (rng.random() < 0.03)  # a late replica
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            failed = rng.random() < 0.25
            row = named(make_scored(prompt.sample_id.prompt, [4, 1], version=born), prompt.sample_id)
            await buffer.put(ticket, Void(prompt.sample_id, "chance") if failed else row, member)

        async def produce():
            nonlocal admitted
            async with asyncio.TaskGroup() as tasks:
                while True:
                    ticket = await buffer.admit()
                    admitted += size
                    for member in range(size):
                        tasks.create_task(rollout(ticket, member, prompts.next()))

        producer = asyncio.create_task(produce())
        trained: set[SampleId] = set()
        settled: set[SampleId] = set()
        for step in range(steps):
            batch = await buffer.take(batch_size, policy_version=step)
            rows = [row.rollout.prompt.sample_id for row in batch.experience]
            given_up = [void.sample_id for void in batch.voids if not void.asked_again]
            assert all(step - row.rollout.policy_versions.min() <= max_staleness for row in batch.experience)
            groups = defaultdict(list)
            for sample_id in rows:
                groups[sample_id[:2]].append(sample_id.replica)
            assert len(groups) == batch_size // size
            assert all(replicas == sorted(replicas) for replicas in groups.values())
            assert list(groups) == list(dict.fromkeys(i[:2] for i in rows))  # each in one piece
            assert not trained & set(rows)
            for group, replicas in groups.items():  # the others of the group are void, and told with it
                assert sorted(replicas + [i.replica for i in given_up if i[:2] == group]) == list(range(size))
            trained |= set(rows)
            settled |= {*rows, *given_up}
            prompts.settle(rows + given_up)
            prompts.give_back([void.sample_id for void in batch.voids if void.asked_again])
            whole = defaultdict(int)
            for sample_id in prompts.outstanding:
                whole[sample_id[:2]] += 1
            assert set(whole.values()) <= {size}  # a resumed run asks for whole groups
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            version = step + 1
            await buffer.release(batch_size)
        for _ in range(300):
            await asyncio.sleep(0)
        assert not producer.done()
        assert buffer._free + size * len(buffer._groups) == (max_staleness + 1) * batch_size
        assert buffer._free < size  # every slot is in use again
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)
        assert settled.isdisjoint(prompts.outstanding)

    asyncio.run(asyncio.wait_for(scenario(), 60))


class SomeFail(FakeRoles):
    """Scores no prompt 2, and no second response to prompt 5."""

    async def score(self, ref):
        if ref.sample_id.prompt == 2 or ref.sample_id[1:] == (5, 1):
            return Void(ref.sample_id, "told to fail")
        return await super().score(ref)


def grouped_run(directory, roles, **overrides):
    settings = {"rollouts_per_step": 6, "prompts": {"rollouts_per_prompt": 3}, "ppo": {"advantages": "group"}}
    run = make_run(directory, roles, **settings, **overrides)
    records = [PromptRecord(f"q{i}", np.array([3, 4], dtype=np.int32), {}) for i in range(10)]
    run.prompts = PromptStream(records, seed=0, rollouts_per_prompt=3)
    run.heldout = []
    return run


def prompts_of(tables) -> list[dict[int, list[int]]]:
    """For each batch, its prompts with their replicas."""
    batches = []
    for table in tables:
        groups = defaultdict(list)
        for prompt, replica in zip(table["prompt_index"].to_pylist(), table["replica"].to_pylist()):
            groups[prompt].append(replica)
        batches.append(dict(groups))
    return batches


def test_the_loop_learns_from_whole_groups_also_after_voids_and_a_resume(tmp_path):
    whole, cut, rest = SomeFail([]), SomeFail([]), SomeFail([])
    asyncio.run(train(grouped_run(tmp_path / "whole", whole, num_steps=5)))
    asyncio.run(train(grouped_run(tmp_path / "cut", cut, num_steps=2)))
    asyncio.run(train(grouped_run(tmp_path / "cut", rest, num_steps=5)))
    batches = prompts_of(whole.tables)
    assert [len(batch) for batch in batches] == [2] * 5
    assert all(
        replicas == ([0, 2] if prompt == 5 else [0, 1, 2]) for batch in batches for prompt, replicas in batch.items()
    )
    assert {prompt for batch in batches for prompt in batch} >= {5}
    assert not any(2 in batch for batch in batches)
    assert prompts_of(cut.tables + rest.tables) == batches


def test_without_groups_the_responses_of_a_prompt_may_part(tmp_path):
    run = grouped_run(tmp_path, SomeFail([]), num_steps=3)
    run.cfg = tiny_config("unused", num_steps=3, rollouts_per_step=6, prompts={"rollouts_per_prompt": 3})
    asyncio.run(train(run))
    assert [step.table.num_rows for step in run.journal.since(0)] == [6] * 3  # every void is replaced
