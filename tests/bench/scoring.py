"""Does batching cost anything? Scoring services through the whole pool, against the same passes called directly.

scoring: the lower throughput ratio of two services, reference and reward model. The parts have for each:

- throughput_ratio: tokens/s of 64 requests sent at once through Ray, pool and batcher, over tokens/s of `forward`
  called on the same requests in batches of the same token budget, in a process with the same number of threads. The two
  alternate.
- idle_ms: latency of a single request. Compare pass_alone_ms, the pass that it needs, plus the batch window.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.pool.ray_actor import actor
from actors.pool.roles import ReferencePool, RewardPool
from actors.scoring.model_source import RewardModelSource
from actors.scoring.reference import ReferencePolicy
from actors.scoring.reward import Reward
from common.config.actors import ReferenceConfig, SourcesConfig
from common.config.base import RayConfig
from common.config.sources import ModelSourceConfig
from common.model.batches import token_batches
from common.model.files import load_tokenizer, resolve_model
from common.model.reward_head import ScoreScale, load_reward_model, save_reward_model
from common.types import Prompt, RewardInput, Rollout, RolloutRef, SampleId, Score
from deploy.cluster.connection import cluster
from tests.bench.results import Result
from tests.ray_pools import start_pool

MODEL = "embedded:smollm2-135m-instruct"
REQUESTS, ROUNDS, IDLE_REQUESTS = 64, 3, 15
BUDGET, WINDOW_MS, THREADS = 4096, 5, 1  # one thread: the driver needs a core too


class Direct:
    """The same models in a process of their own, called without a service around them."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(THREADS)
        self._reference = ReferencePolicy("direct", reference_config(), model=MODEL, temperature=1.0)
        self._reward = RewardModelSource(model_config(model), gpus=0)
        self._tokenizer = load_tokenizer(resolve_model(MODEL))

    def logprobs(self, rollouts: list[Rollout]) -> float:
        """Seconds for all of them, in as few passes as the budget allows."""
        started = time.perf_counter()
        for group in token_batches([r.num_tokens for r in rollouts], BUDGET):
            self._reference.forward([rollouts[i] for i in group])
        return time.perf_counter() - started

    def score(self, rollouts: list[Rollout]) -> float:
        started = time.perf_counter()
        ids = [self._reward.token_ids(self._answer(rollout)) for rollout in rollouts]
        for group in token_batches([len(row) for row in ids], BUDGET):
            self._reward.forward([ids[i] for i in group])
        return time.perf_counter() - started

    def _answer(self, rollout: Rollout) -> RewardInput:
        text = self._tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)
        return RewardInput(rollout.prompt.text, text, len(rollout.response_ids), rollout.finish_reason, {})


def reference_config() -> ReferenceConfig:
    return ReferenceConfig(threads=THREADS, in_flight=REQUESTS, max_batch_tokens=BUDGET, batch_window_ms=WINDOW_MS)


def model_config(model: str) -> ModelSourceConfig:
    return ModelSourceConfig(name="reward", model=model, max_batch_tokens=BUDGET, batch_window_ms=WINDOW_MS)


def make_rollouts(count: int) -> list[Rollout]:
    """Ragged: prompts of 8 to 40 tokens, responses of 8 to 88."""
    rng, tokenizer = np.random.default_rng(0), load_tokenizer(resolve_model(MODEL))
    rollouts = []
    for index in range(count):
        prompt = rng.integers(100, 40_000, rng.integers(8, 41)).astype(np.int32)
        response = rng.integers(100, 40_000, rng.integers(8, 89)).astype(np.int32)
        zeros = np.zeros(len(response), np.float32)
        text = tokenizer.decode(prompt.tolist())
        asked = Prompt(SampleId(0, index, 0), text, prompt)
        rollouts.append(Rollout(asked, response, zeros, zeros.astype(np.int32), "stop", "none"))
    return rollouts


async def compare(model: str) -> dict[str, dict[str, float]]:
    rollouts = make_rollouts(REQUESTS)
    tokens = sum(rollout.num_tokens for rollout in rollouts)
    service = SourcesConfig(sources=(model_config(model),), threads=THREADS, in_flight=REQUESTS)
    start: dict[str, Any] = {"startup_timeout_s": 300}
    references = await start_pool(
        ReferencePolicy, reference_config(), reference_config(), model=MODEL, temperature=1.0, **start
    )
    rewards = await start_pool(Reward, service, service, model=MODEL, **start)
    direct = actor(Direct, service).remote(model)
    calls = {
        "reference": (ReferencePool(references).logprobs, direct.logprobs),
        "reward_model": (RewardPool(rewards).score, direct.score),
    }
    result: dict[str, dict[str, float]] = {}
    for name, (call, directly) in calls.items():
        asked = [replace(RolloutRef.of(rollout), rollout=rollout) for rollout in rollouts]
        await asyncio.gather(*(call(written) for written in asked[:8]))
        await directly.remote(rollouts[:8])
        served, plain, idle, alone = [], [], [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            answers = await asyncio.gather(*(call(written) for written in asked))
            served.append(time.perf_counter() - started)
            assert all(isinstance(answer, Score) or answer[1] for answer in answers)
            plain.append(await directly.remote(rollouts))
        for written in asked[:IDLE_REQUESTS]:
            started = time.perf_counter()
            await call(written)
            idle.append(time.perf_counter() - started)
            alone.append(await directly.remote([written.rollout]))
        result[name] = {
            "throughput_ratio": statistics.median(plain) / statistics.median(served),
            "served_tokens_per_s": tokens / statistics.median(served),
            "direct_tokens_per_s": tokens / statistics.median(plain),
            "idle_ms": 1000 * statistics.median(idle),
            "idle_worst_ms": 1000 * max(idle),
            "pass_alone_ms": 1000 * statistics.median(alone),
            "window_ms": WINDOW_MS,
        }
    return result


def make_reward_model(directory: Path) -> str:
    """A reward model of the demo's size; its head's weights do not matter for speed."""
    base = resolve_model(MODEL)
    model = load_reward_model(base, dtype=torch.float32, device=torch.device("cpu"))
    torch.nn.init.normal_(model.score.weight, std=0.02)
    save_reward_model(model, base, directory, ScoreScale(chat=False))
    return str(directory.resolve())


def measure() -> dict[str, Result]:
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        model = make_reward_model(Path(folder) / "reward-model")
        with cluster(RayConfig(dashboard=False)):
            found = asyncio.run(compare(model))
    parts = {f"{service}_{key}": value for service, row in found.items() for key, value in row.items()}
    return {"scoring": Result(min(row["throughput_ratio"] for row in found.values()), ">= 0.9", parts)}
