"""The `Engine` protocol: what a generator needs of an inference engine. Runs in each generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.weights import Bucket


@dataclass(frozen=True)
class Completion:
    """An engine's response to one prompt."""

    token_ids: np.ndarray  # int32 [R], with the end token if there is one
    logprobs: np.ndarray  # float32 [R] nats, of the distribution that was sampled from
    policy_versions: np.ndarray  # int32 [R], the version that sampled each token
    finish_reason: str  # "stop", "length" or common.types.HANDED_OVER
    cached_tokens: int = 0  # prompt tokens whose keys and values were in the prefix cache


class Engine(Protocol):
    """An inference engine that serves one policy. Its weights are replaced while it runs."""

    async def generate(
        self,
        prompt_ids: np.ndarray,
        *,
        seed: int,
        num_begun: int = 0,
        plain_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> Completion:
        """One response to `prompt_ids`, int32 [P]. The last `num_begun` of them are the start of a response that the
        engine continues. The same seed under the same weights gives the same tokens. Raises EngineDeadError.

        The response has at most `max_new_tokens` tokens, including its `num_begun` first ones. `max_tokens`, at least
        1, bounds the tokens that this call adds. A response that reaches a bound has the finish reason "length".

        With `plain_tokens`: this many tokens, sampled from the model's whole distribution at the run's temperature,
        without truncation. Sampling does not stop at an end token or a stop text, and `max_tokens` has no effect.
        """

    async def hand_over(self) -> None:
        """Ends every running response now, and every later one when it starts. `generate` returns the partial
        response, with the finish reason HANDED_OVER."""

    async def sleep(self) -> None:
        """Frees the engine's GPU memory until `wake`. Requests wait; those that had begun keep their tokens."""

    async def wake(self) -> None:
        """Allocates the memory again and continues. Has no effect on an engine that is awake."""

    async def stage(self, bucket: Bucket) -> None:
        """Prepares a verified bucket for the next `swap`, while running requests continue with the current weights.

        Buckets arrive one at a time and in order; bucket 0 drops everything staged before. Raises CorruptWeightsError
        for a tensor whose name or shape the model does not have.
        """

    async def swap(self, version: int) -> float:
        """Puts the staged weights in place between two engine steps: tokens sampled later have this `version`. Returns
        the length of the engine's pause in seconds.

        Raises CorruptWeightsError, with the old weights in place, if a parameter has no staged value; EngineDeadError
        if the swap fails half way.
        """
