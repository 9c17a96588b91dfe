"""What does serving vLLM through a pool cost? Rollouts through Ray, pool and generator, against vLLM called directly.

generator_vs_vllm: tokens/s of 64 requests sent one by one to the pool, over tokens/s of the same requests given to
vLLM's engine at once, in a separate process with the same engine settings and number of threads. The two alternate.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from functools import partial
from typing import Any

import numpy as np

from actors.generation.engine import Engine
from actors.generation.generator import Generator, sampling_seed
from actors.pool.ray_actor import actor
from actors.pool.ray_host import RayHost
from actors.pool.roles import GeneratorPool
from common.config.actors import GeneratorsConfig, SamplingConfig
from common.config.base import RayConfig
from common.model.files import resolve_model
from common.types import Prompt, SampleId
from deploy.cluster.connection import cluster
from tests.bench.batch import MODEL
from tests.bench.results import Result

REQUESTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 50, 32, 3


def make_engine(cfg: GeneratorsConfig) -> Engine:
    from actors.generation.vllm_engine import VLLMEngine

    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return VLLMEngine(resolve_model(MODEL), cfg, sampling, max_model_len=128, end_token_ids=[2])


class Direct:
    """vLLM as a script would use it: an engine with the same settings, all requests added, and steps until done."""

    def __init__(self, cfg: GeneratorsConfig) -> None:
        engine: Any = make_engine(cfg)
        self._llm, self._sampling = engine._engine, engine._sampling  # its own thread sleeps until it is called

    def generate(self, prompts: list[Prompt]) -> float:
        """Seconds for all of them."""
        from vllm import SamplingParams

        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            params = SamplingParams(**self._sampling, seed=sampling_seed(0, prompt.sample_id))
            self._llm.add_request(str(index), {"prompt_token_ids": prompt.token_ids.tolist()}, params)
        outputs = []
        while self._llm.has_unfinished_requests():
            outputs += [output for output in self._llm.step() if output.finished]
        seconds = time.perf_counter() - started
        assert [len(output.outputs[0].token_ids) for output in outputs] == [NEW_TOKENS] * len(prompts)
        return seconds


async def compare(cfg: GeneratorsConfig) -> dict[str, float]:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(SampleId(0, index, 0), "", rng.integers(100, 40_000, PROMPT_TOKENS).astype(np.int32))
        for index in range(REQUESTS)
    ]
    generators = GeneratorPool(RayHost(Generator, cfg, 0, partial(make_engine, cfg)), cfg)
    pool = await generators.pool.start(300)
    direct = actor(Direct, cfg).remote(cfg)
    served, plain = [], []
    for _ in range(1 + ROUNDS):  # the first only warms up
        started = time.perf_counter()
        rollouts = await asyncio.gather(*(generators.generate(prompt) for prompt in prompts))
        served.append(time.perf_counter() - started)
        assert all(written.num_tokens == PROMPT_TOKENS + NEW_TOKENS for written in rollouts)
        plain.append(await direct.generate.remote(prompts))
    served, plain = served[1:], plain[1:]
    pool.stop()
    tokens = REQUESTS * NEW_TOKENS
    return {
        "ratio": statistics.median(plain) / statistics.median(served),
        "worst_round_ratio": min(there / here for here, there in zip(served, plain, strict=True)),
        "pool_tokens_per_s": tokens / statistics.median(served),
        "vllm_tokens_per_s": tokens / statistics.median(plain),
    }


def measure() -> dict[str, Result]:
    with cluster(RayConfig(dashboard=False)):
        parts = asyncio.run(compare(GeneratorsConfig(in_flight=REQUESTS)))
    return {"generator_vs_vllm": Result(parts["ratio"], ">= 0.95", parts)}
