"""What the loop asks of the roles around it. The pool and the learner group fulfil it on Ray, fakes in the tests."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from common.types import Prompt, Rollout, Score, Void


class Generators(Protocol):
    async def generate(self, prompt: Prompt) -> Rollout: ...

    async def load(self, weights: AsyncIterable[Any], version: int) -> dict[str, float]:
        """Returns when every routable replica has verified and holds `version`, with what it took: `weights/*`."""


class Reward(Protocol):
    async def score(self, rollout: Rollout) -> Score | Void: ...

    async def judge(self, rollout: Rollout) -> Score | Void:
        """As `score`, with the components of the judges beside, which count nothing in the total."""


class Reference(Protocol):
    async def logprobs(self, rollout: Rollout) -> np.ndarray: ...


class LearnerGroup(Protocol):
    @property
    def step(self) -> int:
        """Updates done; also the policy version that the next publication carries."""

    async def update(self, table: pa.Table) -> dict[str, float]: ...

    def publish(self) -> AsyncIterator[Any]:
        """Handles to the newest weights, bucket by bucket as they are packed, for `Generators.load`; tensors do not
        pass through the caller."""

    async def save(self, directory: Path) -> None: ...

    async def restore(self, directory: Path) -> None: ...

    async def save_policy(self, directory: Path) -> None: ...
