"""Prompt to rollout: a generator over an `Engine`. The pool makes it a Ray actor; nothing here knows of that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

from actors.engine import Engine
from common.types import Prompt, Rollout, SampleId
from common.weights import Arrivals, Bucket, Changes, CorruptWeightsError


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
        self._version = 0
        self._arrivals = Arrivals()
        self._keeps = updates == "changes"
        self._held: dict[int, Bucket] = {}  # of `_version`
        self._staged: dict[int, Bucket] = {}

    def __repr__(self) -> str:
        return self._name

    async def ready(self) -> str:
        return self._name

    async def generate(self, prompt: Prompt) -> Rollout:
        """A function of (weights, run seed, sample id) alone, so a re-issued prompt gives the same rollout."""
        done = await self._engine.generate(prompt.token_ids, seed=sampling_seed(self._seed, prompt.sample_id))
        return Rollout(
            prompt, done.token_ids, done.logprobs, done.policy_versions, done.finish_reason, generator=self._name
        )

    async def stage(self, *parts: Bucket | Changes) -> None:
        """Verifies the next buckets of new weights and sets them aside. Raises CorruptWeightsError, also for changes of
        what is not held here; then the set may begin anew."""
        for part in parts:
            bucket = self._applied(part) if isinstance(part, Changes) else part
            self._arrivals.add(bucket)
            if bucket.version != self._version:
                if bucket.index == 0:
                    self._staged = {}
                if self._keeps:
                    self._staged[bucket.index] = bucket
                await self._engine.stage(bucket)

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
        return self._version, pause_s


def sampling_seed(run_seed: int, sample_id: SampleId) -> int:
    """63 bits that differ for every run seed and sample id."""
    digest = hashlib.blake2b(f"{run_seed}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
