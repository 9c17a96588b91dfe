"""The `Engine` protocol: what a generator needs of an inference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.weights import Bucket


@dataclass(frozen=True)
class Completion:
    """What an engine wrote for one prompt."""

    token_ids: np.ndarray  # int32 [R], end token included when there is one
    logprobs: np.ndarray  # float32 [R] nats, of the distribution really sampled from
    policy_versions: np.ndarray  # int32 [R]
    finish_reason: str  # "stop", "length" or common.types.HANDED_OVER


class Engine(Protocol):
    async def generate(
        self, prompt_ids: np.ndarray, *, seed: int, num_begun: int = 0, plain_tokens: int = 0
    ) -> Completion:
        """One response, or the rest of one whose first `num_begun` tokens end the `prompt_ids`. The same seed under the
        same weights gives the same tokens. Raises EngineDeadError.

        With `plain_tokens` this many tokens of the model's whole distribution: nothing is cut off from it or forbidden,
        and no end token ends it.
        """

    async def hand_over(self) -> None:
        """Ends every response where it is, now and from now on: `generate` returns what there is as HANDED_OVER."""

    async def stage(self, bucket: Bucket) -> None:
        """Sets a verified bucket aside for the next `swap`; running requests go on with the weights they have.

        Buckets come one at a time and in order; bucket 0 drops what was staged before. Raises CorruptWeightsError if
        the model has no place for a tensor.
        """

    async def swap(self, version: int) -> float:
        """Puts the staged weights in place between two engine steps: tokens sampled after this carry `version`. Returns
        how long the engine did not step for it, seconds.

        Raises CorruptWeightsError if they leave a parameter without a value, and keeps the old ones; EngineDeadError
        if it fails half way.
        """
