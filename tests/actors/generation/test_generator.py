"""The generator's side of a weight update: which buckets reach the engine, and which are refused before."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.generation.engine import Completion
from actors.generation.generator import Generator, sampling_seed
from common.errors import CorruptWeightsError, EngineDeadError
from common.types import SampleId, Turn
from common.weights import buckets, make_delta
from tests.fakes import OWN_TAGS, make_prompt, make_rollout, metered


class RecordingEngine:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.staged: dict[str, list[float]] = {}

    async def stage(self, bucket) -> None:
        self.calls.append(f"stage {bucket.version}.{bucket.index}")
        self.staged |= {name: tensor.tolist() for name, tensor in bucket.tensors()}

    async def generate(
        self, prompt_ids, *, seed: int, num_begun: int = 0, plain_tokens: int = 0, max_tokens: int | None = None
    ) -> Completion:
        length = len(prompt_ids)
        return Completion(np.ones(length, np.int32), np.zeros(length, np.float32), np.zeros(length, np.int32), "stop")

    async def swap(self, version: int) -> float:
        self.calls.append(f"swap {version}")
        return 0.25


def packed(version: int):
    return list(buckets([(name, torch.ones(2)) for name in "abc"], version, bucket_bytes=4))


def run(*actions):
    """Each action is a bucket to stage or a version to swap in. Returns the engine's calls, the refusals, and the
    versions held."""
    engine = RecordingEngine()
    generator = Generator("Generator(0)", 0, lambda: engine)
    refused, held = [], []

    async def scenario():
        for action in actions:
            try:
                if isinstance(action, int):
                    held.append((await generator.swap(action))[0])
                else:
                    await generator.stage(action)
            except CorruptWeightsError as error:
                refused.append(str(error))

    asyncio.run(scenario())
    return engine.calls, refused, held


def test_buckets_are_staged_in_order_and_then_swapped_in():
    calls, refused, held = run(*packed(3), 3)
    assert calls == ["stage 3.0", "stage 3.1", "stage 3.2", "swap 3"]
    assert (refused, held) == ([], [3])


def test_a_version_that_is_published_again_is_loaded_again():
    """As by a learner that was lost in between."""
    calls, refused, held = run(*packed(3), 3, *packed(3)[:2], *packed(3), 3)
    whole = ["stage 3.0", "stage 3.1", "stage 3.2", "swap 3"]
    assert calls == [*whole, *whole[:2], *whole]
    assert (refused, held) == ([], [3, 3])


def test_a_set_is_swapped_in_once():
    calls, refused, held = run(*packed(3), 3, 3)
    assert calls == ["stage 3.0", "stage 3.1", "stage 3.2", "swap 3"]
    assert "version 3 is not complete" in refused[0]
    assert held == [3]


@pytest.mark.parametrize("kept", [[0, 1], [0, 2], [1, 2], [0, 2, 1], [0, 1, 1, 2]], ids=str)
def test_an_incomplete_set_never_reaches_a_swap(kept):
    calls, refused, held = run(*(packed(3)[index] for index in kept), 3)
    assert refused
    assert held == []
    assert "swap 3" not in calls


def test_a_corrupt_bucket_never_reaches_the_engine():
    bad = packed(3)
    bad[1] = replace(bad[1], checksum=bad[1].checksum ^ 1)
    calls, refused, held = run(*bad, 3)
    assert calls == ["stage 3.0"]
    assert "bucket 1 has checksum" in refused[0]
    assert held == []


def test_an_update_is_loaded_after_one_that_broke_off():
    calls, refused, held = run(*packed(3)[:2], *packed(4), 4)
    assert calls == ["stage 3.0", "stage 3.1", "stage 4.0", "stage 4.1", "stage 4.2", "swap 4"]
    assert (refused, held) == ([], [4])


def test_only_the_requested_version_is_swapped_in():
    calls, refused, held = run(*packed(3), 4, 3)
    assert calls == ["stage 3.0", "stage 3.1", "stage 3.2", "swap 3"]
    assert "version 4 is not complete: 3 buckets of version 3 came" in refused[0]
    assert held == [3]


def test_rollouts_tokens_and_updates_are_metered():
    memory = metered()
    generator = Generator("Generator(0)", 0, RecordingEngine)

    def read(name: str) -> list[float]:
        return memory.read(f"ratchet_generator_{name}", **OWN_TAGS)

    assert [read("rollouts_total"), read("tokens_total"), read("nonfinite_total")] == [[0], [0], [0]]
    assert [read("weights_version"), read("stage_seconds")] == [[0], []]

    async def scenario():
        for length in (2, 5):
            await generator.generate(make_prompt(token_ids=tuple(range(length))))
        for version in (3, 4):
            await generator.stage(*packed(version))
            await generator.swap(version)

    asyncio.run(scenario())
    assert [read("rollouts_total"), read("tokens_total")] == [[2], [7]]
    assert read("weights_version") == [4]
    assert len(read("stage_seconds")) == 2
    assert all(0 < seconds < 60 for seconds in read("stage_seconds"))


def test_a_continued_response_has_its_own_sampling_seed():
    seeds = [sampling_seed(7, SampleId(0, 3, 1), begun) for begun in (0, 1, 2)]
    assert len(set(seeds)) == 3
    assert seeds[0] == sampling_seed(7, SampleId(0, 3, 1))
    asked: list[tuple[int, int, list[int]]] = []

    class Asked(RecordingEngine):
        async def generate(
            self, prompt_ids, *, seed: int, num_begun: int = 0, plain_tokens: int = 0, max_tokens: int | None = None
        ) -> Completion:
            asked.append((seed, num_begun, prompt_ids.tolist()))
            return await super().generate(prompt_ids[:1], seed=seed)

    async def scenario():
        generator = Generator("Generator(1)", 7, Asked)
        prompt = make_prompt(3, (3, 4))
        rollout, _ = await generator.generate(prompt, make_rollout(prompt, [8, 9], version=5))
        return rollout

    rollout = asyncio.run(scenario())
    assert asked == [(sampling_seed(7, make_prompt(3).sample_id, 2), 2, [3, 4, 8, 9])]
    assert (rollout.response_ids.tolist(), rollout.policy_versions.tolist()) == ([8, 9, 1], [5, 5, 0])


def test_the_next_turn_of_an_episode_follows_the_environments_tokens():
    asked: list[tuple[int, dict]] = []

    class Asked(RecordingEngine):
        async def generate(self, prompt_ids, **options) -> Completion:
            asked.append((prompt_ids.tolist(), options))
            return await super().generate(prompt_ids[:2], seed=0)

    prompt, turns = make_prompt(3, (3, 4)), (Turn(2, 4, 0.5),)
    begun = make_rollout(prompt, [8, 9], version=5)
    begun = replace(begun, turns=turns, response_ids=np.array([8, 9, 40, 41], dtype=np.int32))

    async def scenario():
        generator = Generator("Generator(1)", 7, Asked, max_response=10)
        rollout, _ = await generator.generate(prompt, begun)
        # Another generator sampled the first token of the second turn.
        await generator.generate(prompt, replace(begun, response_ids=np.append(begun.response_ids, np.int32(1))))
        return rollout

    rollout = asyncio.run(scenario())
    seeds = [sampling_seed(7, prompt.sample_id, written) for written in (4, 5)]
    assert asked == [
        ([3, 4, 8, 9, 40, 41], {"seed": seeds[0], "num_begun": 0, "plain_tokens": 0, "max_tokens": 6}),
        ([3, 4, 8, 9, 40, 41, 1], {"seed": seeds[1], "num_begun": 1, "plain_tokens": 0, "max_tokens": 5}),
    ]
    assert rollout.response_ids.tolist() == [8, 9, 40, 41, 1, 1]
    assert rollout.policy_versions.tolist() == [5, 5, 0, 0]
    assert rollout.turns == turns


def test_a_swap_returns_how_long_the_engine_did_not_step():
    async def scenario():
        generator = Generator("Generator(0)", 0, RecordingEngine)
        await generator.stage(*packed(3))
        return await generator.swap(3)

    assert asyncio.run(scenario()) == (3, 0.25)


def test_version_0_of_a_learner_is_loaded():
    calls, refused, held = run(*packed(0), 0)
    assert calls == ["stage 0.0", "stage 0.1", "stage 0.2", "swap 0"]
    assert (refused, held) == ([], [0])


def wide(version: int, moved: dict[str, float]):
    """Three buckets of eight ones each, whose first value may be replaced."""
    named = [(name, torch.tensor([moved.get(name, 1.0)] + [1.0] * 7)) for name in "abc"]
    return list(buckets(named, version, bucket_bytes=16))


def since(old, new):
    return [make_delta(*pair) for pair in zip(old, new, strict=True)]


V3, V4, V5 = wide(3, {}), wide(4, {"a": 2.0}), wide(5, {"a": 2.0, "c": 3.0})


async def updated(engine, *updates, keeps="changes"):
    """A generator after these updates."""
    generator = Generator("Generator(0)", 0, lambda: engine, updates=keeps)
    for parts in updates:
        await generator.stage(*parts)
        await generator.swap(parts[0].version)
    return generator


def test_from_deltas_the_engine_gets_complete_buckets():
    engine = RecordingEngine()
    full_between = [V5[0], *since(V4, V5)[1:]]  # no delta of this bucket was smaller
    asyncio.run(updated(engine, V3, since(V3, V4), full_between))
    assert engine.calls[-4:] == ["stage 5.0", "stage 5.1", "stage 5.2", "swap 5"]
    assert engine.staged == {"a": [2.0] + [1.0] * 7, "b": [1.0] * 8, "c": [3.0] + [1.0] * 7}


@pytest.mark.parametrize(
    ("keeps", "loaded", "message"),
    [
        ("changes", [], "Generator(0) holds no bucket 0 to apply the delta to"),
        ("full", [V4], "Generator(0) holds no bucket 0 to apply the delta to"),
        ("changes", [V3], "since version 4 was applied to bucket 0 of version 3"),
    ],
)
def test_a_delta_without_its_base_is_refused_and_a_full_set_is_loaded(keeps, loaded, message):
    engine = RecordingEngine()

    async def scenario():
        generator = await updated(engine, *loaded, keeps=keeps)
        with pytest.raises(CorruptWeightsError) as refused:
            await generator.stage(*since(V4, V5))
        assert message in str(refused.value)
        with pytest.raises(CorruptWeightsError, match="version 5 is not complete"):
            await generator.swap(5)
        await generator.stage(*V5)
        return await generator.swap(5)

    assert asyncio.run(scenario())[0] == 5
    assert engine.staged["c"][0] == 3.0


def test_a_delta_is_never_applied_to_a_set_that_broke_off():
    engine = RecordingEngine()

    async def scenario():
        generator = await updated(engine, V3)
        await generator.stage(*since(V3, V4)[:2])
        with pytest.raises(CorruptWeightsError, match="was applied to bucket 0 of version 3"):
            await generator.stage(*since(V4, V5))
        await generator.stage(*since(V3, V5))
        return await generator.swap(5)

    assert asyncio.run(scenario())[0] == 5
    assert engine.staged == {"a": [2.0] + [1.0] * 7, "b": [1.0] * 8, "c": [3.0] + [1.0] * 7}


def test_a_generator_is_ready_once_its_engine_has_written_a_token():
    asked = []

    class Asked(RecordingEngine):
        async def generate(self, prompt_ids, **options) -> Completion:
            asked.append((prompt_ids.tolist(), options))
            return await super().generate(prompt_ids, **options)

    assert asyncio.run(Generator("Generator(1)", 7, Asked).ready()) == "Generator(1)"
    assert asked == [([0], {"seed": 0, "plain_tokens": 1})]


def test_a_generator_whose_engine_fails_is_not_ready_and_says_why():
    class Unfit(RecordingEngine):
        async def generate(self, prompt_ids, **options) -> Completion:
            raise EngineDeadError("the engine failed: NotImplementedError: head_dim=16")

    with pytest.raises(EngineDeadError, match="head_dim=16"):
        asyncio.run(Generator("Generator(0)", 7, Unfit).ready())
