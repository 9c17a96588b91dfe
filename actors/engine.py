"""The `Engine` protocol: what a generator needs of an inference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.weights import WeightSet


class EngineDeadError(RuntimeError):
    """The engine failed and will not answer again; its replica must be replaced."""


@dataclass(frozen=True)
class Completion:
    """What an engine wrote for one prompt."""

    token_ids: np.ndarray  # int32 [R], end token included when there is one
    logprobs: np.ndarray  # float32 [R] nats, of the distribution really sampled from
    policy_versions: np.ndarray  # int32 [R]
    finish_reason: str  # "stop" or "length"


class Engine(Protocol):
    async def generate(self, prompt_ids: np.ndarray, *, seed: int) -> Completion:
        """One response. The same seed under the same weights gives the same tokens. Raises EngineDeadError."""

    async def load_weights(self, weights: WeightSet) -> None:
        """Replaces all weights between two engine steps; tokens sampled after this carry `weights.version`.

        Raises EngineDeadError if that fails half way.
        """
