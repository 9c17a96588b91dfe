"""Turns a prompt into a rollout with an `Engine`. Runs in each generator.

A plain class: `actors.pool.ray_actor` makes it a Ray actor.
"""

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
from common.weights import Bucket, Delta, IncomingWeights


class Generator:
    """Generates rollouts. Every token carries the version of the policy that sampled it."""

    def __init__(
        self,
        name: str,
        seed: int,
        make_engine: Callable[[], Engine],
        *,
        updates: Literal["full", "changes"] = "full",
        max_response: int | None = None,
    ) -> None:
        """With updates = "changes" the generator keeps the buckets of its weights, so that it can apply deltas.
        `max_response`: bound on a response, environment tokens included; None: the engine's bound on a turn."""
        self._name = name
        self._seed = seed
        self._max_response = max_response
        self._engine = make_engine()
        self._version: int | None = None  # the learner's version in use; None: the weights of the model's files
        self._incoming = IncomingWeights()
        self._staging_s = 0.0  # seconds spent on staging the current update
        for counted in ("rollouts", "tokens", "nonfinite"):
            meters.count(f"ratchet_generator_{counted}_total", 0)
        meters.gauge("ratchet_generator_weights_version", 0)
        self._keeps_buckets = updates == "changes"
        self._held: dict[int, Bucket] = {}  # buckets of `_version`, by index; empty unless `_keeps_buckets`
        self._staged: dict[int, Bucket] = {}  # the same for the next version

    async def ready(self) -> str:
        """Returns the generator's name once the engine has sampled a token, which shows that it can run this model.
        Raises EngineDeadError with the reason."""
        await self._engine.generate(np.zeros(1, dtype=np.int32), seed=0, plain_tokens=1)
        return self._name

    async def generate(
        self, prompt: Prompt, begun: Rollout | None = None, plain_tokens: int = 0
    ) -> tuple[Rollout, RolloutRef]:
        """The rollout, and the facts about it that the loop needs. Ray keeps the rollout here until it is fetched.

        While the weights stay the same, its tokens depend only on them, the run's seed, the sample id and the answers
        of an environment. `begun` is a partial response, by another generator or of an episode. This call continues
        it, from the newest context of the episode. Its tokens keep their versions and log-probabilities.
        """
        written = np.empty(0, dtype=np.int32) if begun is None else begun.response_ids
        num_begun = len(written) - (0 if begun is None else begun.turn_start)  # tokens of this turn
        seed = sampling_seed(self._seed, prompt.sample_id, len(written))
        plain_left = max(1, plain_tokens - num_begun) if plain_tokens else 0
        done = await self._engine.generate(
            prompt.token_ids if begun is None else begun.context_ids,
            seed=seed,
            num_begun=num_begun,
            plain_tokens=plain_left,
            max_tokens=None if self._max_response is None else max(1, self._max_response - len(written)),
        )
        arrays = done.token_ids, done.logprobs, done.policy_versions
        if begun is not None:
            before = begun.response_ids, begun.rollout_logprobs, begun.policy_versions
            arrays = tuple(np.concatenate(pair) for pair in zip(before, arrays, strict=True))
        turns = () if begun is None else begun.turns
        rollout = Rollout(
            prompt, *arrays, done.finish_reason, self._name, turns=turns, cached_tokens=done.cached_tokens
        )
        ref = RolloutRef.of(rollout)
        meters.count("ratchet_generator_tokens_total", len(done.token_ids))
        meters.count("ratchet_generator_rollouts_total", ref.finished)
        meters.count("ratchet_generator_nonfinite_total", bool(ref.fault))
        return rollout, ref

    async def hand_over(self) -> None:
        """Ends every response now. `generate` returns the partial responses, for other generators to continue."""
        await self._engine.hand_over()

    async def sleep(self) -> None:
        """Lends the engine's GPU memory to the learner until `wake`. Every request waits meanwhile."""
        await self._engine.sleep()

    async def wake(self) -> None:
        """Continues after `sleep`; does nothing on a generator that is awake."""
        await self._engine.wake()

    async def stage(self, *parts: Bucket | Delta) -> None:
        """Verifies the next buckets of new weights and keeps them for `swap`. Raises CorruptWeightsError, also if this
        generator does not hold the base of a delta. The caller may then send the set again from bucket 0.

        Bucket 0 drops everything staged before. A version may arrive twice, even if it is in use already: after a loss
        of ranks during a publication, new ranks publish it again, perhaps with other rounding."""
        for part in parts:
            started = time.perf_counter()
            bucket = self._apply(part) if isinstance(part, Delta) else part
            self._incoming.add(bucket)
            if bucket.index == 0:
                self._staged = {}
            if self._keeps_buckets:
                self._staged[bucket.index] = bucket
            await self._engine.stage(bucket)
            self._staging_s = (self._staging_s if bucket.index else 0.0) + time.perf_counter() - started

    def _apply(self, delta: Delta) -> Bucket:
        if delta.index not in self._held:
            raise CorruptWeightsError(
                f"weights version {delta.version}: {self._name} holds no bucket {delta.index} to apply the delta to"
            )
        return delta.apply(self._held[delta.index])

    async def swap(self, version: int) -> tuple[int, float]:
        """Samples with the staged weights from now on. Returns the version in use, and the engine's pause in
        seconds. Raises CorruptWeightsError unless all of `version` is staged."""
        self._incoming.check_complete(version)
        pause_s = await self._engine.swap(version)
        self._incoming = IncomingWeights()
        self._version, self._held, self._staged = version, self._staged, {}
        meters.observe("ratchet_generator_stage_seconds", self._staging_s)
        meters.gauge("ratchet_generator_weights_version", version)
        return version, pause_s


def sampling_seed(run_seed: int, sample_id: SampleId, num_begun: int = 0) -> int:
    """A seed of 63 bits. It differs by run seed, sample id, and the number of tokens that the response has already."""
    place = f"/{num_begun}" if num_begun else ""
    digest = hashlib.blake2b(f"{run_seed}/{sample_id}{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
