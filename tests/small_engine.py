"""A small engine in vLLM's place, for runs on Ray that test something else. Runs in each generator.

vLLM takes most of the time in which a tiny run starts. This engine writes one token after the other with transformers,
so it is only fast enough for tiny models. Its tokens, log-probabilities and versions are exact, like vLLM's.

It is used by every process that was started with `variables()`: site/sitecustomize.py then loads this file as
actors.generation.vllm_engine.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.generation.engine import Completion
from common.config.actors import GeneratorsConfig, SamplingConfig
from common.errors import CorruptWeightsError
from common.types import HANDED_OVER
from common.weights import Bucket

ROOT = Path(__file__).parents[1]


def variables() -> dict[str, str]:
    """The environment variables of a run whose generators use this engine. They replace PYTHONPATH."""
    return {"SMALL_ENGINE": __file__, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/site")))}


class VLLMEngine:
    """An `Engine` that computes on the event loop, one token at a time. It samples from the whole distribution."""

    def __init__(
        self,
        model: Path,
        cfg: GeneratorsConfig,
        sampling: SamplingConfig,
        *,
        max_model_len: int,
        end_token_ids: list[int],
        **_: Any,
    ) -> None:
        assert (cfg.dtype, sampling.top_p, sampling.top_k, sampling.stop) == ("float32", 1.0, 0, ())
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._weights = dict(self._model.named_parameters())
        self._staged: dict[str, Tensor] = {}
        self._sampling, self._length = sampling, max_model_len
        self._ends = [*end_token_ids, *sampling.stop_token_ids]
        self._version = 0
        self._leaving = False
        self._awake = asyncio.Event()
        self._awake.set()

    async def generate(
        self,
        prompt_ids: np.ndarray,
        *,
        seed: int,
        num_begun: int = 0,
        plain_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> Completion:
        longest = self._sampling.max_new_tokens - num_begun
        longest = plain_tokens or min(
            longest, longest if max_tokens is None else max_tokens, self._length - len(prompt_ids)
        )
        random = torch.Generator().manual_seed(seed)
        ids, logprobs, versions = [], [], []
        state, new, reason = None, prompt_ids.tolist(), ""
        while not reason:
            await asyncio.sleep(0)  # other requests and new weights come between two tokens
            await self._awake.wait()
            if self._leaving:
                reason = HANDED_OVER
                break
            with torch.inference_mode():
                output = self._model(torch.tensor([new]), past_key_values=state, use_cache=True)
                logits = output.logits[0, -1] / self._sampling.temperature
                if not plain_tokens and num_begun + len(ids) < self._sampling.min_new_tokens:
                    logits[self._ends] = -torch.inf
                distribution = logits.log_softmax(-1)
                token = int(distribution.exp().multinomial(1, generator=random))
            state, new = output.past_key_values, [token]
            ids.append(token)
            logprobs.append(float(distribution[token]))
            versions.append(self._version)
            if token in self._ends and not plain_tokens:
                reason = "stop"
            elif len(ids) == longest:
                reason = "length"
        return Completion(
            np.array(ids, dtype=np.int32),
            np.array(logprobs, dtype=np.float32),
            np.array(versions, dtype=np.int32),
            reason,
        )

    async def hand_over(self) -> None:
        self._leaving = True

    async def sleep(self) -> None:
        self._awake.clear()

    async def wake(self) -> None:
        self._awake.set()

    async def stage(self, bucket: Bucket) -> None:
        if bucket.index == 0:
            self._staged = {}
        for name, tensor in bucket.tensors():
            if name not in self._weights or tensor.shape != self._weights[name].shape:
                raise CorruptWeightsError(f"weights version {bucket.version}: the model has no place for {name}")
            self._staged[name] = tensor.clone()

    async def swap(self, version: int) -> float:
        started = time.perf_counter()
        if missing := self._weights.keys() - self._staged.keys():
            raise CorruptWeightsError(f"weights version {version}: {min(missing)} is missing")
        with torch.no_grad():
            for name, tensor in self._staged.items():
                self._weights[name].copy_(tensor)
        self._staged, self._version = {}, version
        return time.perf_counter() - started
