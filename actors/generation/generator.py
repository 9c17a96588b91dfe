"""Prompt to rollout: a generator over an `Engine`. The pool makes it a Ray actor; nothing here knows of that."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Literal

import numpy as np

from actors.generation.engine import Engine
from common.errors import CorruptWeightsError
from common.metrics import meters
from common.types import Prompt, Rollout, RolloutRef, SampleId
from common.weights import Bucket, Changes, IncomingWeights


class Generator:
    """Writes rollouts, every token stamped with the policy version that sampled it."""

    def __init__(
        self,
        name: str,
        seed: int,
        make_engine: Callable[[], Engine],
        *,
        updates: Literal["full", "changes"] = "full",
    ) -> None:
        """With updates = "changes" it keeps the buckets it holds, since the next ones may be given as changes."""
        self._name = name
        self._seed = seed
        self._engine = make_engine()
        self._version: int | None = None  # of a learner's weights; None: those of the model's files
        self._arrivals = IncomingWeights()
        self._staging_s = 0.0  # of the update that is under way
        for counted in ("rollouts", "tokens", "nonfinite"):
            meters.count(f"ratchet_generator_{counted}_total", 0)
        meters.gauge("ratchet_generator_weights_version", 0)
        self._keeps = updates == "changes"
        self._held: dict[int, Bucket] = {}  # of `_version`
        self._staged: dict[int, Bucket] = {}

    async def ready(self) -> str:
        """Answers once the engine has written a token: until then nobody knows whether it can compute this model.
        Raises EngineDeadError with its reason."""
        await self._engine.generate(np.zeros(1, dtype=np.int32), seed=0, plain_tokens=1)
        return self._name

    async def generate(
        self, prompt: Prompt, begun: Rollout | None = None, plain_tokens: int = 0
    ) -> tuple[Rollout, RolloutRef]:
        """The rollout, which stays here until it is fetched, and what the loop must know of it.

        Under one version of the weights it is a function of them, run seed and sample id alone. What another generator
        has begun is gone on with; its tokens keep the versions and log-probabilities they were sampled with.
        """
        written = prompt.token_ids if begun is None else np.concatenate([prompt.token_ids, begun.response_ids])
        num_begun = len(written) - len(prompt.token_ids)
        seed = sampling_seed(self._seed, prompt.sample_id, num_begun)
        left = max(1, plain_tokens - num_begun) if plain_tokens else 0
        done = await self._engine.generate(written, seed=seed, num_begun=num_begun, plain_tokens=left)
        arrays = done.token_ids, done.logprobs, done.policy_versions
        if begun is not None:
            before = begun.response_ids, begun.rollout_logprobs, begun.policy_versions
            arrays = tuple(np.concatenate(pair) for pair in zip(before, arrays, strict=True))
        rollout = Rollout(prompt, *arrays, done.finish_reason, generator=self._name)
        written_down = RolloutRef.of(rollout)
        meters.count("ratchet_generator_tokens_total", len(done.token_ids))
        meters.count("ratchet_generator_rollouts_total", written_down.finished)
        meters.count("ratchet_generator_nonfinite_total", bool(written_down.fault))
        return rollout, written_down

    async def hand_over(self) -> None:
        """Ends every response where it is: `generate` returns what there is, for others to go on with."""
        await self._engine.hand_over()

    async def stage(self, *parts: Bucket | Changes) -> None:
        """Verifies the next buckets of new weights and sets them aside. Raises CorruptWeightsError, also for changes of
        what is not held here; then the set may begin anew."""
        for part in parts:
            started = time.perf_counter()
            bucket = self._applied(part) if isinstance(part, Changes) else part
            self._arrivals.add(bucket)
            if bucket.version != self._version:
                if bucket.index == 0:
                    self._staged = {}
                if self._keeps:
                    self._staged[bucket.index] = bucket
                await self._engine.stage(bucket)
            self._staging_s = (self._staging_s if bucket.index else 0.0) + time.perf_counter() - started

    def _applied(self, part: Changes) -> Bucket:
        if part.index not in self._held:
            raise CorruptWeightsError(
                f"weights version {part.version}: changes of bucket {part.index} since version {part.base_version} "
                f"came to {self._name}, which keeps no such bucket"
            )
        return part.apply(self._held[part.index])

    async def swap(self, version: int) -> tuple[int, float]:
        """Samples with the staged weights from here on; returns the version now held, and how long the engine did not
        step, seconds. Raises CorruptWeightsError unless all of `version` is staged."""
        pause_s = 0.0
        if version != self._version:
            self._arrivals.check_whole(version)
            pause_s = await self._engine.swap(version)
            self._version, self._held, self._staged = version, self._staged, {}
            meters.observe("ratchet_generator_stage_seconds", self._staging_s)
            meters.gauge("ratchet_generator_weights_version", version)
        return version, pause_s


def sampling_seed(run_seed: int, sample_id: SampleId, num_begun: int = 0) -> int:
    """63 bits that differ for every run seed, sample id, and token at which a response is gone on with."""
    place = f"/{num_begun}" if num_begun else ""
    digest = hashlib.blake2b(f"{run_seed}/{sample_id}{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
