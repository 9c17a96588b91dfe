"""Prompt to rollout: a generator over an `Engine`. The pool makes it a Ray actor; nothing here knows of that."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np

from actors.engine import Engine
from common import meters
from common.types import Prompt, Rollout, SampleId, Written
from common.weights import Arrivals, Bucket


class Generator:
    """Writes rollouts, every token stamped with the policy version that sampled it."""

    def __init__(self, name: str, seed: int, make_engine: Callable[[], Engine]) -> None:
        self._name = name
        self._seed = seed
        self._engine = make_engine()
        self._version = 0
        self._arrivals = Arrivals()
        self._staging_s = 0.0  # of the update that is under way
        for counted in ("rollouts", "tokens", "nonfinite"):
            meters.count(f"ratchet_generator_{counted}_total", 0)
        meters.gauge("ratchet_generator_weights_version", self._version)

    async def ready(self) -> str:
        return self._name

    async def generate(self, prompt: Prompt, begun: Rollout | None = None) -> tuple[Rollout, Written]:
        """The rollout, which stays here until it is fetched, and what the loop must know of it.

        Under one version of the weights it is a function of them, run seed and sample id alone. What another generator
        has begun is gone on with; its tokens keep the versions and log-probabilities they were sampled with.
        """
        written = prompt.token_ids if begun is None else np.concatenate([prompt.token_ids, begun.response_ids])
        num_begun = len(written) - len(prompt.token_ids)
        seed = sampling_seed(self._seed, prompt.sample_id, num_begun)
        done = await self._engine.generate(written, seed=seed, num_begun=num_begun)
        arrays = done.token_ids, done.logprobs, done.policy_versions
        if begun is not None:
            before = begun.response_ids, begun.rollout_logprobs, begun.policy_versions
            arrays = tuple(np.concatenate(pair) for pair in zip(before, arrays, strict=True))
        rollout = Rollout(prompt, *arrays, done.finish_reason, generator=self._name)
        written_down = Written.of(rollout)
        meters.count("ratchet_generator_tokens_total", len(done.token_ids))
        meters.count("ratchet_generator_rollouts_total", written_down.finished)
        meters.count("ratchet_generator_nonfinite_total", bool(written_down.fault))
        return rollout, written_down

    async def hand_over(self) -> None:
        """Ends every response where it is: `generate` returns what there is, for others to go on with."""
        await self._engine.hand_over()

    async def stage(self, *buckets: Bucket) -> None:
        """Verifies the next buckets of new weights and sets them aside. Raises CorruptWeightsError."""
        for bucket in buckets:
            started = time.perf_counter()
            self._arrivals.add(bucket)
            if bucket.version != self._version:
                await self._engine.stage(bucket)
            self._staging_s = (self._staging_s if bucket.index else 0.0) + time.perf_counter() - started

    async def swap(self, version: int) -> int:
        """Samples with the staged weights from here on; returns the version now held. Raises CorruptWeightsError
        unless all of `version` is staged."""
        if version != self._version:
            self._arrivals.check_whole(version)
            await self._engine.swap(version)
            self._version = version
            meters.observe("ratchet_generator_stage_seconds", self._staging_s)
            meters.gauge("ratchet_generator_weights_version", version)
        return self._version


def sampling_seed(run_seed: int, sample_id: SampleId, num_begun: int = 0) -> int:
    """63 bits that differ for every run seed, sample id, and token at which a response is gone on with."""
    place = f"/{num_begun}" if num_begun else ""
    digest = hashlib.blake2b(f"{run_seed}/{sample_id}{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
