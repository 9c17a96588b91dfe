"""What do a second and a third generator add? Rollouts/s of a pool that is scaled while it works.

Once with real engines of a tiny model on this machine's cores, which are the limit then. Once with engines that take
the time of a distant one (16 responses in 0.5 s) and use no core, which shows the pool's own share.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.generation.engine import Completion
from actors.generation.generator import Generator
from actors.pool.ray_host import RayHost
from actors.pool.replica import PoolEvent
from actors.pool.roles import GeneratorPool
from common.config.actors import GeneratorsConfig, SamplingConfig
from common.config.base import RayConfig
from common.types import Prompt, SampleId
from deploy.cluster.connection import cluster
from tests.bench.results import Result
from tests.fakes import save_tiny_model

NEW_TOKENS = 64
SECONDS = 10.0
RUNNING = 16  # of one engine
REPLICAS = 3


class DistantEngine:
    """Answers sixteen requests at once, each after half a second. Answers health probes at once: they come from the
    event loop of another thread, and a semaphore belongs to one loop."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(RUNNING)

    async def generate(
        self,
        prompt_ids: np.ndarray,
        *,
        seed: int,
        num_begun: int = 0,
        plain_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> Completion:
        if not plain_tokens:
            async with self._room:
                await asyncio.sleep(0.5)
        ids = np.zeros(NEW_TOKENS, dtype=np.int32)
        return Completion(ids, np.zeros(NEW_TOKENS, np.float32), ids, "length")


def real_engine(model: str) -> Any:
    from actors.generation.vllm_engine import VLLMEngine

    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    cfg = GeneratorsConfig(kv_cache_mib=32, max_running=RUNNING)
    return VLLMEngine(Path(model), cfg, sampling, max_model_len=128, end_token_ids=[1])


async def rates(make_engine: Any) -> list[float]:
    """Rollouts a second with 1, 2, ... replicas."""
    cfg = GeneratorsConfig(min=1, max=REPLICAS, cpus=0, max_running=RUNNING, in_flight=2 * RUNNING)
    events: list[PoolEvent] = []
    host, written = RayHost(Generator, cfg, 0, make_engine), 0
    generators = GeneratorPool(host, cfg, on_event=events.append)
    pool = await generators.pool.start(300)
    pool.members.target = 1

    async def ask_on(number: int) -> None:
        nonlocal written
        for index in range(1_000_000):
            prompt = Prompt(SampleId(number, index, 0), "", np.arange(3, 11, dtype=np.int32))
            await generators.generate(prompt)
            written += 1

    asking = [asyncio.create_task(ask_on(number)) for number in range(2 * RUNNING * REPLICAS)]
    found = []
    for target in range(1, REPLICAS + 1):
        pool.members.target = target
        while len(pool.ready) != target:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        before, started = written, time.perf_counter()
        await asyncio.sleep(SECONDS)
        found.append((written - before) / (time.perf_counter() - started))
    for task in asking:
        task.cancel()
    pool.stop()
    assert "died" not in {event.event for event in events}  # a replica that starts again would count as a slow one
    return found


def measure() -> dict[str, Result]:
    with tempfile.TemporaryDirectory() as model, cluster(RayConfig(object_store_mib=256, dashboard=False)):
        save_tiny_model(Path(model))
        distant = asyncio.run(rates(DistantEngine))
        real = asyncio.run(rates(partial(real_engine, model)))
    parts = {f"distant_{n}_rollouts_per_s": rate for n, rate in enumerate(distant, 1)}
    parts |= {f"real_{n}_rollouts_per_s": rate for n, rate in enumerate(real, 1)}
    return {"three_replicas_vs_one": Result(distant[-1] / distant[0], ">= 2.7", parts)}
