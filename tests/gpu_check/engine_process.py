"""A process with a vLLM engine on the device: `python -m tests.gpu_check.engine_process SCENARIO MODEL GPUS RESULT`.

Each scenario writes what it found to the file RESULT, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.generation.engine import Completion, Engine
from common.config.actors import GeneratorsConfig, SamplingConfig
from common.weights import buckets
from tests.fakes import END, make_prompt
from tests.version_models import VERSIONS, head_moved

TEMPERATURE = 0.7
PROMPTS = [make_prompt(i, tuple(3 + (7 * i + j) % 50 for j in range(4 + i % 9))) for i in range(24)]
SET_BYTES = 1 << 26  # of a bucket


def make_engine(model: Path, gpus: float, **settings: Any) -> Engine:
    """In float32, so that its log-probabilities can be compared. On a GPU it has half of it, and can sleep."""
    from actors.generation.vllm_engine import VLLMEngine

    cfg = GeneratorsConfig(gpus=gpus and 0.5, kv_cache_mib=64, **{"dtype": "float32", **settings})
    sampling = SamplingConfig(temperature=TEMPERATURE, max_new_tokens=48)
    return VLLMEngine(model, cfg, sampling, max_model_len=128, end_token_ids=[END], sleeps=gpus > 0)


async def ask(engine: Engine, indices: Sequence[int]) -> list[Completion]:
    """The answers to these prompts, all at once; each prompt has its own seed."""
    return list(await asyncio.gather(*(engine.generate(PROMPTS[i].token_ids, seed=1000 + i) for i in indices)))


async def sampling(model: Path, gpus: float) -> dict[str, Any]:
    """The answers to all prompts: together, together again, one by one, and after the engine slept."""
    engine, every = make_engine(model, gpus), range(len(PROMPTS))
    together, again = await ask(engine, every), await ask(engine, every)
    alone = [(await ask(engine, [i]))[0] for i in every]
    free = [free_bytes()]
    await engine.sleep()
    free.append(free_bytes())
    started = time.perf_counter()
    await engine.wake()
    took = time.perf_counter() - started
    free.append(free_bytes())
    after = await ask(engine, every)
    texts = {"together": together, "again": again, "alone": alone, "after": after}
    return {
        "free": free,
        "wake_s": took,
        "logprobs": [done.logprobs.tolist() for done in together],
        **{name: [done.token_ids.tolist() for done in answers] for name, answers in texts.items()},
    }


async def versions(model: Path, gpus: float) -> dict[str, Any]:
    """Prompts are asked again and again while the weights change. Every answer's tokens and their versions."""
    engine = make_engine(model, gpus)
    tensors = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    answers: list[Completion] = []
    updating = True

    async def keep_asking(index: int) -> None:
        while updating:
            answers.extend(await ask(engine, [index]))

    asking = [asyncio.create_task(keep_asking(index)) for index in range(len(PROMPTS))]
    for version in VERSIONS:
        for bucket in head_moved(tensors, version):
            await engine.stage(bucket)
        await engine.swap(version)
    updating = False
    await asyncio.gather(*asking)
    return {"answers": [[done.token_ids.tolist(), done.policy_versions.tolist()] for done in answers]}


async def pause(model: Path, gpus: float) -> dict[str, Any]:
    """Seconds of staging and of the pause for the whole set of weights, three times, while prompts are answered."""
    engine = make_engine(model, gpus, dtype="bfloat16")
    tensors = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    laps = []
    for version in range(1, 4):
        asking = asyncio.create_task(ask(engine, range(len(PROMPTS))))
        published = list(buckets(tensors.items(), version, bucket_bytes=SET_BYTES))
        started = time.perf_counter()
        for bucket in published:
            await engine.stage(bucket)
        staged = time.perf_counter() - started
        laps.append([staged, await engine.swap(version)])
        await asking
    return {"laps": laps, "bytes": sum(bucket.values.nbytes for bucket in published)}


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def main(scenario: str, model: str, gpus: str, result: str) -> None:
    torch.set_num_threads(1)
    work = {"sampling": sampling, "versions": versions, "pause": pause}[scenario]
    found = asyncio.run(work(Path(model), float(gpus)))
    Path(result).write_text(json.dumps(found, default=np.ndarray.tolist))
    sys.stdout.flush()
    os._exit(0)  # the engine's thread never ends


if __name__ == "__main__":
    main(*sys.argv[1:])
