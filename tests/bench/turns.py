"""What do turns cost? Episodes through Ray, pools, generator and environment, against the same tokens in one turn.

turns_vs_one: sampled tokens per second of 64 episodes of four turns, with an environment that answers at once, over
those of 64 responses with as many tokens in one turn. The engine keeps prefixes in its cache. The two take turns.

engine_busy: the share of the time in which a generator writes, with 64 episodes at once and an environment that takes
one second for each answer.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from actors.environments.environments import Environments
from actors.generation.engine import Engine
from actors.generation.generator import Generator
from actors.pool.episodes import EpisodePool
from actors.pool.pool import Pool
from actors.pool.ray_host import RayHost
from actors.pool.roles import GeneratorPool
from common.config.actors import GeneratorsConfig, PromptFormat, SamplingConfig
from common.config.base import RayConfig
from common.config.environment import EnvironmentConfig
from common.environment import Step
from common.model.files import resolve_model
from common.types import Prompt, SampleId
from deploy.cluster.connection import cluster
from tests.bench.batch import MODEL
from tests.bench.results import Result

EPISODES, PROMPT_TOKENS, TURNS, TURN_TOKENS, ROUNDS = 64, 256, 4, 32, 3
SLOW_S = 1.0  # seconds of an answer of the slow environment
CONTEXT = 512
CACHE_MIB = 1024  # holds all episodes at once: 64 x 400 tokens of 23 KB are 560 MiB


class AtOnce:
    """Answers at once, with a few tokens, until the last turn."""

    seconds = 0.0

    async def reset(self, prompt: Any) -> None:
        self.turns = 0

    async def step(self, message: Mapping[str, Any]) -> Step:
        self.turns += 1
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return Step(" Go on.", terminated=self.turns == TURNS)


class Slow(AtOnce):
    seconds = SLOW_S


class GeneratorOfTurns(Generator):
    """Has a name of its own: two actors of one Ray cannot have the same name."""


def make_engine(cfg: GeneratorsConfig, tokens: int) -> Engine:
    """An engine whose responses or turns all have `tokens` tokens."""
    from actors.generation.vllm_engine import VLLMEngine

    sampling = SamplingConfig(max_new_tokens=tokens, min_new_tokens=tokens)
    model = resolve_model(MODEL)
    return VLLMEngine(model, cfg, sampling, max_model_len=CONTEXT, end_token_ids=[2], caches_prefixes=True)


def prompts(round_: int) -> list[Prompt]:
    """New ones in each round, so that no prompt is in the cache before its first turn."""
    rng = np.random.default_rng(round_)
    tokens = rng.integers(100, 40_000, (EPISODES, PROMPT_TOKENS)).astype(np.int32)
    return [Prompt(SampleId(round_, index, 0), "", row) for index, row in enumerate(tokens)]


async def seconds_of(generators: GeneratorPool | EpisodePool, round_: int) -> float:
    started = time.perf_counter()
    await asyncio.gather(*(generators.generate(prompt) for prompt in prompts(round_)))
    return time.perf_counter() - started


def environments(name: str) -> Pool:
    """The pool of the environment with this name. It is not started."""
    role = type(f"Environments{name}", (Environments,), {})  # two actors of one Ray cannot have the same name
    cfg = EnvironmentConfig(function=f"tests.bench.turns:{name}", max_turns=TURNS, max_tokens=CONTEXT - PROMPT_TOKENS)
    return Pool(RayHost(role, cfg, cfg, model=MODEL, prompts=PromptFormat()), cfg)


async def compare(cfg: GeneratorsConfig) -> dict[str, dict[str, float]]:
    sampled = EPISODES * TURNS * TURN_TOKENS
    many = GeneratorPool(RayHost(GeneratorOfTurns, cfg, 0, partial(make_engine, cfg, TURN_TOKENS)), cfg)
    one = GeneratorPool(RayHost(Generator, cfg, 0, partial(make_engine, cfg, TURNS * TURN_TOKENS)), cfg)
    answering = [await environments(name).start(300) for name in ("AtOnce", "Slow")]
    pools = [await many.pool.start(300), await one.pool.start(300), *answering]
    at_once, slow = (EpisodePool(many, pool) for pool in answering)
    in_turns, whole = [], []
    for round_ in range(1 + ROUNDS):  # the first only warms up
        in_turns.append(await seconds_of(at_once, round_))
        whole.append(await seconds_of(one, round_))
    started = time.perf_counter()
    await seconds_of(slow, 1 + ROUNDS)
    lasted = time.perf_counter() - started
    waited = slow.waited_s()
    for pool in pools:
        pool.stop()
    in_turns, whole = in_turns[1:], whole[1:]
    return {
        "turns": {
            "ratio": statistics.median(whole) / statistics.median(in_turns),
            "worst_round_ratio": min(there / here for here, there in zip(in_turns, whole, strict=True)),
            "tokens_per_s_in_turns": sampled / statistics.median(in_turns),
            "tokens_per_s_in_one": sampled / statistics.median(whole),
        },
        "slow": {"busy": 1 - waited / lasted, "seconds": lasted, "seconds_at_once": statistics.median(in_turns)},
    }


def measure() -> dict[str, Result]:
    with cluster(RayConfig(dashboard=False)):
        parts = asyncio.run(compare(GeneratorsConfig(in_flight=EPISODES, kv_cache_mib=CACHE_MIB)))
    return {
        "turns_vs_one": Result(parts["turns"]["ratio"], ">= 0.9", parts["turns"]),
        "engine_busy": Result(parts["slow"]["busy"], ">= 0.9", parts["slow"]),
    }
