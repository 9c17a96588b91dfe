"""The generator's side of a weight update: what reaches the engine, and what is refused before it does."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.engine import Completion
from actors.generator import Generator
from common.weights import CorruptWeightsError, buckets
from tests.fakes import OWN_TAGS, make_prompt, metered


class RecordingEngine:
    def __init__(self) -> None:
        self.calls: list[str] = []

    async def stage(self, bucket) -> None:
        self.calls.append(f"stage {bucket.version}.{bucket.index}")

    async def generate(self, prompt_ids, *, seed: int) -> Completion:
        length = len(prompt_ids)
        return Completion(np.ones(length, np.int32), np.zeros(length, np.float32), np.zeros(length, np.int32), "stop")

    async def swap(self, version: int) -> None:
        self.calls.append(f"swap {version}")


def packed(version: int):
    return list(buckets([(name, torch.ones(2)) for name in "abc"], version, bucket_bytes=4))


def run(*actions):
    """Each action is a bucket to stage or a version to swap in; returns the engine's calls and the refusals."""
    engine = RecordingEngine()
    generator = Generator("Generator(0)", 0, lambda: engine)
    refused, held = [], []

    async def scenario():
        for action in actions:
            try:
                if isinstance(action, int):
                    held.append(await generator.swap(action))
                else:
                    await generator.stage(action)
            except CorruptWeightsError as error:
                refused.append(str(error))

    asyncio.run(scenario())
    return engine.calls, refused, held


def test_buckets_are_staged_in_order_and_the_version_held_is_reported():
    calls, refused, held = run(*packed(3), 3)
    assert calls == ["stage 3.0", "stage 3.1", "stage 3.2", "swap 3"]
    assert (refused, held) == ([], [3])


def test_a_version_that_is_held_already_is_not_loaded_again():
    calls, refused, held = run(*packed(3), 3, *packed(3), 3, 3)
    assert calls == ["stage 3.0", "stage 3.1", "stage 3.2", "swap 3"]
    assert (refused, held) == ([], [3, 3, 3])


@pytest.mark.parametrize("kept", [[0, 1], [0, 2], [1, 2], [0, 2, 1], [0, 1, 1, 2]], ids=str)
def test_a_set_that_is_not_whole_never_reaches_a_swap(kept):
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


def test_after_an_update_that_broke_off_the_next_one_is_loaded():
    calls, refused, held = run(*packed(3)[:2], *packed(4), 4)
    assert calls == ["stage 3.0", "stage 3.1", "stage 4.0", "stage 4.1", "stage 4.2", "swap 4"]
    assert (refused, held) == ([], [4])


def test_only_the_version_asked_for_is_swapped_in():
    calls, refused, held = run(*packed(3), 4, 3)
    assert calls == ["stage 3.0", "stage 3.1", "stage 3.2", "swap 3"]
    assert "version 4 is not whole: 3 buckets of version 3 came" in refused[0]
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
