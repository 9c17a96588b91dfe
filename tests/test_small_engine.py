"""The small engine does what tests of whole runs expect of vLLM."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config.ppo import Config
from common.errors import CorruptWeightsError
from common.weights import buckets
from tests import small_engine
from tests.fakes import END, save_tiny_model, tiny_config
from tests.small_engine import VLLMEngine, variables

PROMPT = np.array([3, 4, 40], dtype=np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models with different weights."""
    directory = tmp_path_factory.mktemp("models")
    return [save_tiny_model(directory / str(seed), seed=seed) for seed in range(2)]


def engine_of(model, **sampling: Any) -> VLLMEngine:
    cfg: Config = tiny_config(model, sampling={"max_new_tokens": 8, **sampling})
    return VLLMEngine(model, cfg.generators, cfg.sampling, max_model_len=20, end_token_ids=[END])


def expected_logprobs(model, response: list[int], temperature: float = 1.0) -> np.ndarray:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = network(torch.tensor([[*PROMPT.tolist(), *response]])).logits[0, len(PROMPT) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(response)), response].numpy()


def test_log_probabilities_are_those_of_the_model_at_the_temperature(models):
    engine = engine_of(models[0], temperature=0.5)
    done = asyncio.run(engine.generate(PROMPT, seed=5))
    np.testing.assert_allclose(done.logprobs, expected_logprobs(models[0], done.token_ids.tolist(), 0.5), atol=1e-5)
    assert done.policy_versions.tolist() == [0] * len(done.token_ids)


def test_a_seed_gives_the_same_tokens_next_to_other_requests(models):
    async def several() -> list[list[int]]:
        engine = engine_of(models[0])
        together = await asyncio.gather(*(engine.generate(PROMPT, seed=seed) for seed in range(4)))
        return [done.token_ids.tolist() for done in [*together, await engine.generate(PROMPT, seed=2)]]

    found = asyncio.run(several())
    assert found[4] == found[2]
    assert len(set(map(tuple, found))) == 4


SAMPLES = 400


def test_each_token_is_sampled_as_often_as_it_is_likely(models):
    engine = engine_of(models[0], max_new_tokens=1)

    async def first_tokens() -> list[int]:
        return [int((await engine.generate(PROMPT, seed=seed)).token_ids[0]) for seed in range(SAMPLES)]

    found = np.bincount(asyncio.run(first_tokens()), minlength=64) / SAMPLES
    expected = np.exp([expected_logprobs(models[0], [token])[0] for token in range(64)])
    assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / SAMPLES)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 8),
        ({"num_begun": 3}, 5),
        ({"max_tokens": 2}, 2),
        ({"num_begun": 7, "max_tokens": 2}, 1),
        ({"plain_tokens": 4}, 4),
    ],
)
def test_a_response_ends_at_its_bound(models, options, length):
    engine = engine_of(models[0], min_new_tokens=8)  # no end token before
    done = asyncio.run(engine.generate(PROMPT, seed=1, **options))
    assert (len(done.token_ids), done.finish_reason) == (length, "length")


def test_a_response_ends_at_an_end_token(models):
    engine = engine_of(models[0], stop_token_ids=list(range(32, 64)))
    done = asyncio.run(engine.generate(PROMPT, seed=1))
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] >= 32
    assert all(token < 32 for token in done.token_ids[:-1])


def published(model, version: int) -> list:
    return list(buckets(AutoModelForCausalLM.from_pretrained(model).named_parameters(), version, bucket_bytes=20_000))


def test_tokens_have_the_version_and_the_probabilities_of_the_weights_that_sampled_them(models, tmp_path):
    async def swapped() -> Any:
        engine = engine_of(models[0], min_new_tokens=8)
        for bucket in published(models[1], 3):
            await engine.stage(bucket)
        running = asyncio.create_task(engine.generate(PROMPT, seed=1))
        for _ in range(4):
            await asyncio.sleep(0)
        await engine.swap(3)
        return await running, await engine.generate(PROMPT, seed=2, plain_tokens=6)

    before, after = asyncio.run(swapped())
    assert sorted(set(before.policy_versions.tolist())) == [0, 3]
    assert before.policy_versions.tolist() == sorted(before.policy_versions.tolist())
    assert set(after.policy_versions.tolist()) == {3}
    model = AutoModelForCausalLM.from_pretrained(models[1]).to(torch.bfloat16).to(torch.float32)
    model.save_pretrained(tmp_path)
    expected = expected_logprobs(tmp_path, after.token_ids.tolist())
    np.testing.assert_allclose(after.logprobs, expected, atol=1e-5)


def test_an_incomplete_set_is_refused_and_changes_nothing(models):
    async def incomplete() -> Any:
        engine = engine_of(models[0])
        await engine.stage(published(models[1], 3)[0])
        with pytest.raises(CorruptWeightsError, match="is missing"):
            await engine.swap(3)
        return await engine.generate(PROMPT, seed=1)

    done = asyncio.run(incomplete())
    np.testing.assert_allclose(done.logprobs, expected_logprobs(models[0], done.token_ids.tolist()), atol=1e-5)


def test_handed_over_responses_return_what_they_have(models):
    async def leave() -> Any:
        engine = engine_of(models[0], min_new_tokens=8)
        running = asyncio.create_task(engine.generate(PROMPT, seed=1))
        for _ in range(4):
            await asyncio.sleep(0)
        await engine.hand_over()
        return await running

    done = asyncio.run(leave())
    assert done.finish_reason == "handed over"
    assert 0 < len(done.token_ids) < 8


def test_a_process_with_its_variables_finds_it_in_vllms_place():
    code = "from importlib.util import find_spec; print(find_spec('actors.generation.vllm_engine').origin)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == small_engine.__file__
