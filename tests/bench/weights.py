"""What does a weight update cost? A policy of 135M parameters, from the learner to a generator with requests running.

- update_vs_memcpy: how long the generator's requests wait for the swap, over one warm memcpy of the bytes sent;
- publish_vs_memcpy: time from the learner's first packing until the last bucket is verified and staged on the
  generator, over the same; publish_to_serving ends when the swap is reported, for which the current engine step must
  end;
- step_slowdown: how much longer an engine step takes while a set is being staged;
- changes_vs_full: bytes of the values that one AdamW step changes, over those of the full set, and the time to find and
  to apply them, over the memcpy.

For changes_vs_full no real step is made. As in AdamW's first step, every float32 weight moves by the learning rate, up
or down at random; later steps move most weights less. It starts from the checkpoint's own values, and from the values
of training: anywhere between one bf16 value and the next. From the checkpoint fewer values change.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.generation.generator import Generator
from actors.pool.ray_actor import actor
from actors.pool.ray_host import RayHost
from actors.pool.roles import GeneratorPool
from common.config.actors import GeneratorsConfig, SamplingConfig
from common.config.base import RayConfig
from common.config.ppo import LearnerConfig
from common.model.files import load_policy, resolve_model
from common.types import Prompt, SampleId
from common.weights import Bucket, Delta, Manifest, buckets, make_delta, publication
from deploy.cluster.connection import cluster
from learner.ranks.group import LearnerGroup
from tests.bench.batch import MODEL
from tests.bench.results import Result

UPDATES, WARM_UP, RUNNING = 8, 3, 8
PAUSE_S = 2.0  # between updates, in which undisturbed steps are timed


class Publisher:
    """The part of a learner that publishes: the policy in float32, which moves a little between two versions."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._policy = load_policy(resolve_model(MODEL), dtype=torch.float32, device=torch.device("cpu"))
        self._version = 0

    def open_rendezvous(self, host: str) -> str:
        return ""

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        return 0

    @torch.no_grad()
    def move(self) -> int:
        self._version += 1
        for parameter in self._policy.parameters():
            parameter.mul_(1 + 1e-4)
        return self._version

    def publish(self) -> Iterator[Bucket | Delta | Manifest]:
        named = ((name, parameter.detach()) for name, parameter in self._policy.named_parameters())
        yield from publication(buckets(named, self._version))

    def memcpy_s(self) -> tuple[float, int]:
        """Seconds of one copy of the set's bytes into a buffer already in use, and the bytes."""
        num_bytes = 2 * sum(parameter.numel() for parameter in self._policy.parameters())
        return memcpy_s(num_bytes), num_bytes


def memcpy_s(num_bytes: int) -> float:
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    return seconds_of(lambda: np.copyto(target, source))


def seconds_of(function: Callable[[], Any], rounds: int = 9) -> float:
    """Median of several calls."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


class TimedGenerator(Generator):
    """Notes, on the engine's thread, every step's time and every swap's."""

    def __init__(self, name: str, seed: int, make_engine: Any) -> None:
        super().__init__(name, seed, make_engine)
        self._steps: list[tuple[float, float]] = []  # end, seconds
        self._swaps: list[float] = []
        self._staged_at = 0.0  # perf_counter, which all processes of a machine share on Linux
        engine: Any = self._engine
        engine._engine.step = self._timed(engine._engine.step, self._note_step)
        engine._weights.swap = self._timed(engine._weights.swap, self._note_swap)

    def _timed(self, function: Any, note: Any) -> Any:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            note(started, time.perf_counter())
            return result

        return timed

    def _note_step(self, started: float, ended: float) -> None:
        self._steps.append((ended, ended - started))

    def _note_swap(self, started: float, ended: float) -> None:
        self._swaps.append(ended - started)

    async def stage(self, *parts: Bucket | Delta) -> None:
        await super().stage(*parts)
        self._staged_at = time.perf_counter()

    async def take_notes(self) -> tuple[list[float], list[float], float, int]:
        """Seconds of the steps and swaps since the last call, when the last bucket was staged, and this process's
        resident bytes."""
        steps, swaps = [seconds for _, seconds in self._steps], list(self._swaps)
        self._steps.clear()
        self._swaps.clear()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return steps, swaps, self._staged_at, pages * 4096


def make_engine(cfg: GeneratorsConfig, sampling: SamplingConfig) -> Any:
    from actors.generation.vllm_engine import VLLMEngine

    return VLLMEngine(resolve_model(MODEL), cfg, sampling, max_model_len=512, end_token_ids=[2])


async def keep_busy(generators: GeneratorPool, number: int) -> None:
    """One request after the other, until cancelled."""
    rng = np.random.default_rng(number)
    for index in range(10_000):
        prompt = Prompt(SampleId(number, index, 0), "", rng.integers(100, 40_000, 20).astype(np.int32))
        await generators.generate(prompt)


async def update_often(cfg: GeneratorsConfig) -> dict[str, float]:
    sampling = SamplingConfig(max_new_tokens=256, min_new_tokens=256)
    learner_cfg = LearnerConfig()
    rank = actor(Publisher, learner_cfg).remote()
    learner = LearnerGroup(lambda _: rank, learner_cfg, startup_timeout_s=300)
    generators = GeneratorPool(RayHost(TimedGenerator, cfg, 0, partial(make_engine, cfg, sampling)), cfg)
    pool, _ = await asyncio.gather(generators.pool.start(300), learner.start())
    requests = [asyncio.create_task(keep_busy(generators, number)) for number in range(RUNNING)]

    async def notes() -> tuple[list[float], list[float], float, int]:
        [noted] = (await pool.each(lambda replica: replica.handle.take_notes.remote())).values()
        return noted

    rows: list[dict[str, Any]] = []
    await asyncio.sleep(2 * PAUSE_S)
    for _ in range(WARM_UP + UPDATES):
        version = await rank.move.remote()
        await notes()
        await asyncio.sleep(PAUSE_S)
        undisturbed, *_ = await notes()
        started = time.perf_counter()
        await generators.load(learner.publish(), version)
        loaded = time.perf_counter() - started
        staging, [swap], staged_at, resident = await notes()
        rows.append(
            {
                "standstill_s": swap,
                "publish_to_verified_s": staged_at - started,
                "publish_to_serving_s": loaded,
                "step_s": statistics.median(undisturbed),
                "step_while_staging_s": statistics.median(staging),
                "longest_step_while_staging_s": max(staging),
                "resident_mib": resident >> 20,
            }
        )
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    pool.stop()
    memcpy_s, num_bytes = await rank.memcpy_s.remote()  # with nothing else running
    learner.stop()
    return summarise(rows[WARM_UP:], memcpy_s, num_bytes)


def summarise(rows: list[dict[str, Any]], memcpy_s: float, num_bytes: int) -> dict[str, float]:
    def middle(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    def worst(key: str) -> float:
        return max(row[key] for row in rows)

    return {
        "bytes": num_bytes,
        "memcpy_s": memcpy_s,
        "standstill_s": middle("standstill_s"),
        "standstill_ratio": middle("standstill_s") / memcpy_s,
        "standstill_worst_ratio": worst("standstill_s") / memcpy_s,
        "publish_to_verified_s": middle("publish_to_verified_s"),
        "publish_ratio": middle("publish_to_verified_s") / memcpy_s,
        "publish_worst_ratio": worst("publish_to_verified_s") / memcpy_s,
        "publish_to_serving_s": middle("publish_to_serving_s"),
        "step_s": middle("step_s"),
        "step_slowdown": middle("step_while_staging_s") / middle("step_s"),
        "longest_step_while_staging_s": worst("longest_step_while_staging_s"),
        "resident_first_mib": rows[0]["resident_mib"],
        "resident_last_mib": rows[-1]["resident_mib"],
    }


@torch.no_grad()
def find_changes(model: str) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy = load_policy(resolve_model(model), dtype=torch.float32, device=torch.device("cpu"))
    checkpoint = dict(policy.named_parameters())
    memcpy = memcpy_s(2 * sum(weight.numel() for weight in checkpoint.values()))
    parts = {"memcpy_s": memcpy}
    for start, weights in (("checkpoint", checkpoint), ("trained", {n: trained(w) for n, w in checkpoint.items()})):
        old = list(buckets(weights.items(), 0))
        for rate in ("1e-6", "1e-5"):
            moved = ((name, weight + float(rate) * torch.randn_like(weight).sign()) for name, weight in weights.items())
            pairs = list(zip(old, buckets(moved, 1), strict=True))
            made = [make_delta(*pair) for pair in pairs]
            sent = sum(new.values.nbytes if change is None else change.nbytes for change, (_, new) in zip(made, pairs))
            found_s = seconds_of(lambda pairs=pairs: [make_delta(*pair) for pair in pairs])
            applicable = [(change, base) for change, base in zip(made, old) if change is not None]
            applied_s = seconds_of(lambda applicable=applicable: [change.apply(base) for change, base in applicable])
            parts |= {
                f"{start}_{rate}_bytes_ratio": sent / sum(bucket.values.nbytes for bucket in old),
                f"{start}_{rate}_find_ratio": found_s / memcpy,
                f"{start}_{rate}_apply_ratio": applied_s / memcpy,
            }
    return parts


def trained(weight: Tensor) -> Tensor:
    """Anywhere between the bf16 values around `weight`, where many small steps would have brought it."""
    exponent = weight.frexp().exponent
    step = torch.ldexp(torch.ones_like(weight), exponent - 8)  # eight bits of mantissa, the leading one among them
    return weight + (torch.rand_like(weight) - 0.5) * step


def measure() -> dict[str, Result]:
    found = find_changes(MODEL)
    with cluster(RayConfig(dashboard=False)):
        parts = asyncio.run(update_often(GeneratorsConfig()))
    return {
        "changes_vs_full": Result(found["trained_1e-6_bytes_ratio"], "", found),
        "update_vs_memcpy": Result(parts["standstill_ratio"], "<= 3", parts),
        "publish_vs_memcpy": Result(parts["publish_ratio"], "<= 20", {"publish_s": parts["publish_to_verified_s"]}),
    }
